"""Checkpoints with thinking modules, engines that open them, and what `hybrid_generate` says of the same requests."""

import contextlib
import functools
import gc
import tempfile
from pathlib import Path

import torch

from tests import tiny
from unsloth_ext import DelimiterMatcher, ThinkingConfig, attach_thinking, hybrid_generate
from unsloth_ext.common.wrapping import backbone_of


DELIMITER = "##"
LENGTH = 128


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
    tiny.loud_gates(backbone_of(model))
    model.generation_config.eos_token_id = 1
    folder = Path(tempfile.mkdtemp(prefix="thinking"))
    tokenizer = tiny.tokenizer()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model, folder, tokenizer


@contextlib.contextmanager
def engine(folder, **settings):
    """An engine in this process, gone at the end of the block."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests import vllm_on_cpu  # noqa: F401
    from unsloth_ext import thinking_llm

    settings = {"answer_delimiter": DELIMITER, "max_num_seqs": 5, "kv_cache_memory_bytes": 1 << 24, **settings}
    llm = thinking_llm(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=LENGTH,
        logprobs_mode="processed_logprobs",
        **settings,
    )
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


def alone(model, tokenizer, prompt, delimiter=DELIMITER, **settings):
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
