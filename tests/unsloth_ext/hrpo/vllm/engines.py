"""Checkpoints with thinking modules, engines that open them, and what `hybrid_generate` says of the same requests."""

import contextlib
import functools
import gc
import tempfile
from pathlib import Path

import torch

from tests import tiny
from unsloth_ext import (
    DelimiterMatcher,
    ThinkingConfig,
    attach_thinking,
    hybrid_generate,
    soft_embedding,
    take_traces,
    thinking_llm,
    traced,
)
from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.hrpo.states import Warper


DELIMITER = "##"
LENGTH = 128
# Sums in another order: 1e-6 at one token. Each state is made from the one before, so differences grow along a text
GREEDY = {"rtol": 0, "atol": 2e-4}
STATES = {"rtol": 0, "atol": 1e-3}


@functools.cache
def checkpoint(family="qwen2", source="projection", norm="unit", seed=0):
    """A saved model that thinks, in memory and in a folder, and its tokenizer."""
    config = tiny.config(family)
    config.hidden_size, config.head_dim = 128, 32  # vLLM's attention on CPUs has no smaller heads
    model = tiny.from_config(config, seed=seed, std=0.12).eval()
    if family == "gemma":  # it multiplies its embeddings by this; the tied head would repeat the last token for ever
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(config.hidden_size**-0.5)
    attach_thinking(model, ThinkingConfig(thinking_source=source, thinking_norm=norm))
    tiny.loud_gates(backbone_of(model), seed)
    model.generation_config.eos_token_id = 1
    folder = Path(tempfile.mkdtemp(prefix="thinking"))
    tokenizer = tiny.tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, folder, tokenizer


@contextlib.contextmanager
def engine(folder, make=thinking_llm, **settings):
    """An engine in this process, gone at the end of the block. `make` may be `vllm.LLM`, for other engines."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests import vllm_on_cpu  # noqa: F401

    settings = {
        "max_num_seqs": 5,
        "kv_cache_memory_bytes": 1 << 24,
        "max_model_len": LENGTH,
        **({"answer_delimiter": DELIMITER} if make is thinking_llm else {}),
        **settings,
    }
    llm = make(str(folder), dtype="float32", enforce_eager=True, logprobs_mode="processed_logprobs", **settings)
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()


def prompts(count=12):
    """Ragged prompts of characters."""
    return [[5 + (7 * i + j) % 40 for j in range(3 + i)] for i in range(count)]


def log_probs(completion):
    return torch.tensor([next(iter(each.values())).logprob for each in completion.logprobs])


def alone(model, tokenizer, prompt, /, delimiter=DELIMITER, **settings):
    """One prompt's greedy completion by `hybrid_generate`, and its trace."""
    ids = torch.tensor([prompt])
    matcher = DelimiterMatcher(tokenizer, delimiter, model.config.vocab_size)
    keep = ("log_probs", "hidden_states", "thinking_states")
    # vLLM's greedy decoding has no support but the whole vocabulary, and transformers' default is the first 50 tokens
    settings = {"do_sample": False, "top_k": 0, "eos_token_id": 1, "pad_token_id": 0, **settings}
    out, trace = hybrid_generate(
        model, ids, matcher, attention_mask=torch.ones_like(ids), keep=keep, return_trace=True, **settings
    )
    return out[0, len(prompt) :].tolist(), trace


def sampling(**settings):
    """Parameters of one request, with log-probs and a trace. Greedy without a temperature."""
    from vllm import SamplingParams

    return traced(SamplingParams(**{"temperature": 0, "max_tokens": 24, "logprobs": 0, **settings}))


def run(llm, params, texts=None, **settings):
    """What the engine says to some prompts, and the traces: for each prompt one for each completion."""
    texts = prompts(len(params)) if texts is None else texts
    out = llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False, **settings)
    return out, take_traces(llm, params, out)


def worker(llm):
    """The worker of an engine in this process."""
    return llm.llm_engine.model_executor.driver_worker.worker


def check(completion, trace, text, model, tokenizer, /, **settings):
    """Check a greedy completion and its trace against `hybrid_generate`, and return the trace of the latter."""
    wanted, reference = alone(model, tokenizer, text, **settings)
    assert list(completion.token_ids) == wanted
    torch.testing.assert_close(log_probs(completion), reference.log_probs[0], **GREEDY)
    assert trace.thinking_mask.tolist() == reference.thinking_mask.tolist()
    torch.testing.assert_close(trace.hidden_states, reference.hidden_states, **STATES)
    if trace.thinking_states is not None:
        used = reference.thinking_mask[
            :, :-1
        ]  # the last token is never fed, so `hybrid_generate` makes no state for it
        torch.testing.assert_close(
            trace.thinking_states[:, :-1][used], reference.thinking_states[:, :-1][used], **STATES
        )
    return reference


def check_sampled(completion, trace, text, model, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, **_):
    """Check the log-probs of a sampled completion, and with soft embeddings its states, with the training forward."""
    tokens = torch.tensor([list(completion.token_ids)])
    if trace.thinking_states is None:
        thoughts = {"thinking_hidden_states_cache": trace.hidden_states, "recompute_thinking_projection": True}
    else:
        thoughts = {"thinking_embeds": trace.thinking_states}
    ids = torch.cat([torch.tensor([text]), tokens], dim=1)
    with torch.no_grad():
        scores = model(input_ids=ids, thinking_mask=trace.thinking_mask, **thoughts).logits[0, len(text) - 1 : -1]
        scores = Warper(temperature, top_k, top_p, min_p)(scores)
    again = scores.log_softmax(-1).gather(-1, tokens[0, :, None]).squeeze(-1)
    ratio = (again - log_probs(completion)).exp()
    assert (ratio - 1).abs().max() < 1e-5  # float32: sums in another order
    if trace.thinking_states is not None:
        states = soft_embedding(backbone_of(model).get_input_embeddings(), scores.softmax(-1))
        torch.testing.assert_close(trace.thinking_states[0], states, **STATES)
