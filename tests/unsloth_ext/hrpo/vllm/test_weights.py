"""Weights that a trainer pushes into a running engine."""

import pytest

from unsloth_ext import drop_thinking

from .engines import check, checkpoint, engine, prompts, run, sampling, worker


pytestmark = pytest.mark.vllm


def named(model):
    return [(name, parameter.data) for name, parameter in model.named_parameters()]


def push_one_by_one(runner, model):
    """As TRL's colocate mode does. The tied head is not among the parameters."""
    for pair in named(model):
        runner.get_model().load_weights([pair])


def push_by_reloading(runner, model):
    """As vLLM's weight transfer does, on a server: it waits for all weights of a layer before it loads them."""
    runner.reload_weights(weights_iterator=iter(named(model)))


def check_texts(llm, model, tokenizer):
    texts = prompts(3)
    out, traces = run(llm, [sampling(max_tokens=24) for _ in texts], texts)
    for text, one, (trace,) in zip(texts, out, traces, strict=True):
        check(one.outputs[0], trace, text, model, tokenizer, max_new_tokens=24)


@pytest.mark.parametrize("push", [push_one_by_one, push_by_reloading])
def test_an_update_is_seen_by_the_next_rollout(push):
    """All weights change: also the embedding, whose norm the states have here.

    Without `pushed_weights`, vLLM on a CPU keeps a packed copy of a tied head that no update reaches.
    """
    kind = {"norm": "embedding_rms"}
    before, folder, tokenizer = checkpoint(**kind)
    after, _, _ = checkpoint(seed=1, **kind)
    with engine(folder, additional_config={"pushed_weights": True}) as llm:
        check_texts(llm, before, tokenizer)
        push(worker(llm).model_runner, after)
        check_texts(llm, after, tokenizer)


def test_modules_without_weights_are_an_error(tmp_path, monkeypatch):
    """A base model in an engine that a trainer never pushed to."""
    from vllm import LLM

    model, _, tokenizer = checkpoint(seed=2)
    settings = model.config.thinking
    drop_thinking(model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    overrides = {"architectures": ["HybridQwen2ForCausalLM"], "thinking": settings}
    with (
        engine(tmp_path, make=LLM, hf_overrides=overrides, additional_config={"pushed_weights": True}) as llm,
        pytest.raises(ValueError, match=r"the checkpoint lacks .*thinking_projection.*, and no trainer pushed them"),
    ):
        llm.generate([{"prompt_token_ids": [5, 6]}], use_tqdm=False)
