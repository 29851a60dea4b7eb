"""Answers decoded by vLLM against those of transformers."""

import contextlib
import gc

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from tests import tiny
from unsloth_ext import LatentConfig, LatentEngine, LatentModel, attach_latent, backbone_of, latent_generate
from unsloth_ext.latent.config import with_latent_modules
from unsloth_ext.latent.engine import sampling_params, save_merged

from .test_phase import questions


pytestmark = pytest.mark.vllm
STEPS = 24
# Sums in another order, in fp32
LOG_PROBS = {"rtol": 0, "atol": 1e-4}
METHODS = {
    "CODI": {"num_latents": 5, "iterations": None, "projection_dim": 16},
    "PCCoT": {"num_latents": 5, "iterations": 3},
    "KaVa": {"num_latents": 5, "iterations": 3, "projection_dim": 16, "kv_projection": True},
    "pause tokens": {"num_latents": 5, "iterations": 0},
}


def make(family="qwen2", lora=True, tied=True, **settings):
    """A model whose vocabulary had to grow by the latent tokens, and whose adapter does something."""
    tokenizer = tiny.tokenizer(())
    config = tiny.config(family, vocab_size=len(tokenizer))
    if family == "gpt2":
        config.n_embd = 128
    else:
        config.hidden_size, config.head_dim = 128, 32  # vLLM's attention on CPUs has no smaller heads
    config.tie_word_embeddings = tied
    model = tiny.from_config(config, std=0.12).eval()
    if family == "gemma":  # it multiplies its embeddings by this
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(config.hidden_size**-0.5)
    attach_latent(model, tokenizer, LatentConfig(**(settings or METHODS["KaVa"])))
    if lora:
        adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        vars(adapter).update(with_latent_modules(adapter, model))
        model = get_peft_model(model, adapter).eval()
    change(model)
    return model, tokenizer


def change(model, seed=9):
    """What an optimizer step does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (0.5 * parameter.std() or 0.1) * torch.randn_like(parameter)


@contextlib.contextmanager
def engine_of(model, **settings):
    """An engine in this process, gone at the end of the block."""
    from tests import vllm_on_cpu  # noqa: F401, I001
    from vllm.distributed import cleanup_dist_env_and_memory

    engine = LatentEngine(
        model, enforce_eager=True, max_model_len=128, max_num_seqs=5, kv_cache_memory_bytes=1 << 24, **settings
    )
    try:
        yield engine
    finally:
        engine.close()
        cleanup_dist_env_and_memory()
        gc.collect()


def greedy(**settings):
    return {"max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0, "eos_token_id": None, **settings}


def check_equal(model, engine, **settings):
    ids, mask = questions()
    wanted = latent_generate(model, ids, mask, **greedy(**settings))
    found = latent_generate(model, ids, mask, engine=engine, **greedy(**settings))
    assert torch.equal(found, wanted)
    return wanted


@pytest.mark.parametrize(
    ("family", "method"), [("qwen2", "CODI"), ("gpt2", "PCCoT"), ("gemma", "KaVa"), ("llama", "pause tokens")]
)
def test_greedy_answers_are_those_of_transformers(family, method):
    """Ragged questions, with and without an end token, until the answers have ended."""
    model, _ = make(family, **METHODS[method])
    with engine_of(model) as engine:
        plain = check_equal(model, engine)[:, -STEPS:]
        assert len(plain.unique(dim=0)) == 3
        end = plain[0, 6].item()
        ended = check_equal(model, engine, eos_token_id=[end, 1])
        later = check_equal(model, engine, eos_token_id=end, min_new_tokens=9)
        assert (ended[0, -STEPS:] == end).any() and not torch.equal(ended, later)
        check_equal(model, engine, max_new_tokens=1)


@pytest.mark.parametrize("tied", [False, True])
def test_new_weights_are_used_at_the_next_call(tied):
    """vLLM reloads untied weights. On a CPU it packs a tied head, so the engine starts again."""
    model, _ = make(tied=tied)
    with engine_of(model) as engine:
        before = check_equal(model, engine)
        llm = engine.llm
        check_equal(model, engine)
        assert engine.llm is llm
        change(model)
        assert not torch.equal(check_equal(model, engine), before)
        assert (engine.llm is llm) != tied
        model.base_model.disable_adapter_layers()
        check_equal(model, engine)


def test_samples_follow_the_model():
    """Log-probs of sampled tokens are the model's under the same temperature, top-k and min-p; seeds are torch's."""
    model, tokenizer = make()
    sampled = {"do_sample": True, "temperature": 0.8, "top_k": 20, "min_p": 0.02, "num_return_sequences": 3}
    how = GenerationConfig(**greedy(**sampled))
    ids, mask = questions()
    prompt = ids.shape[1] + 2 + 5
    embed = backbone_of(model).get_input_embeddings()
    with engine_of(model, logprobs_mode="processed_logprobs") as engine:
        torch.manual_seed(3)
        out, state = latent_generate(model, ids, mask, engine=engine, return_state=True, **greedy(**sampled))
        torch.manual_seed(3)
        params = sampling_params(how, len(ids))
        for one in params:
            one.logprobs = 0
        thought = torch.tensor(backbone_of(model).latent_token_ids)[[0, 2]]
        bot, eot = embed(thought)[:, None].detach()
        prompts = [
            torch.cat([embed(row[real.bool()]).detach(), bot, latents, eot])
            for row, real, latents in zip(ids, mask, state.latents, strict=True)
        ]
        again = engine.llm.generate([{"prompt_embeds": one} for one in prompts], params, use_tqdm=False)
        rows = [one for request in again for one in request.outputs]
        assert [list(one.token_ids) for one in rows] == out[:, prompt:].tolist()
        assert len({tuple(one.token_ids) for one in rows[:3]}) == 3
        for i, one in enumerate(rows):
            front = torch.cat([prompts[i // 3], embed(torch.tensor(one.token_ids[:-1]))])[None]
            with torch.no_grad():
                logits = model(inputs_embeds=front).logits[0, -STEPS:] / 0.8
            logits[logits < logits.topk(20).values[:, -1:]] = -torch.inf
            logits[logits.softmax(-1) < 0.02 * logits.softmax(-1).amax(-1, keepdim=True)] = -torch.inf
            wanted = logits.log_softmax(-1).gather(-1, torch.tensor(one.token_ids)[:, None])[:, 0]
            found = torch.tensor([next(iter(each.values())).logprob for each in one.logprobs])
            torch.testing.assert_close(found, wanted, **LOG_PROBS)
        loaded = LatentModel(model, tokenizer)
        texts = ["1+2=", "(3+4)*5="]
        short = {"max_new_tokens": 6, "do_sample": False}
        assert loaded.generate(texts, engine=engine, **short) == loaded.generate(texts, **short)
        assert loaded.generate(texts[0], engine=engine, **short) == loaded.generate(texts[0], **short)
        with pytest.raises(ValueError, match="engine: it was made for another model"):
            latent_generate(make()[0], ids, mask, engine=engine, **greedy())


def test_another_computation_than_the_models_is_refused(monkeypatch):
    model, _ = make(lora=False)

    def save_other(model, folder):
        with torch.no_grad():
            other = make(lora=False)[0]
            other.lm_head.weight.mul_(1.05)
        save_merged(other, folder)

    monkeypatch.setattr("unsloth_ext.latent.engine.save_merged", save_other)
    with engine_of(model) as engine, pytest.raises(RuntimeError, match="Qwen2ForCausalLM: vLLM's log-probs"):
        check_equal(model, engine)
    assert engine.llm is None
