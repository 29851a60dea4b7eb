"""Weights that a trainer pushes into a running engine."""

import pytest

from .engines import checkpoint, engine
from .test_decoding import check_greedy, greedy


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


@pytest.mark.parametrize("push", [push_one_by_one, push_by_reloading])
def test_an_update_is_seen_by_the_next_rollout(push):
    """All weights change: also the embedding, whose norm the states have here.

    Without `pushed_weights`, vLLM on a CPU keeps a packed copy of a tied head that no update reaches.
    """
    kind = {"norm": "embedding_rms"}
    before, folder, tokenizer = checkpoint(**kind)
    after, _, _ = checkpoint(seed=1, **kind)
    with engine(folder, additional_config={"pushed_weights": True}) as llm:
        check_greedy(llm, before, tokenizer, greedy(3))
        push(llm.llm_engine.model_executor.driver_worker.worker.model_runner, after)
        check_greedy(llm, after, tokenizer, greedy(3))


def test_modules_without_weights_are_an_error(tmp_path):
    """A base model in an engine that a trainer never pushed to."""
    from unsloth_ext import drop_thinking

    model, _, tokenizer = checkpoint(seed=2)
    settings = model.config.thinking
    drop_thinking(model).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    overrides = {"architectures": ["HybridQwen2ForCausalLM"], "thinking": settings}
    with (
        engine(tmp_path, hf_overrides=overrides, additional_config={"pushed_weights": True}) as llm,
        pytest.raises(RuntimeError, match=r"the checkpoint lacks .*thinking_projection.*, and no trainer pushed them"),
    ):
        llm.generate([{"prompt_token_ids": [5, 6]}], greedy(1), use_tqdm=False)
