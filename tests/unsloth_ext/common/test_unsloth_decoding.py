"""Hybrid decoding under Unsloth: what was sampled is what training scores."""

import importlib.util

import pytest
import torch
from torch import nn

from tests import tiny
from tests.unsloth_scripts import run
from unsloth_ext.common.unsloth_decoding import _Head, returning_hidden_states, without_decode_graphs


unsloth = [
    pytest.mark.unsloth,
    pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="unsloth is not installed"),
]
FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma")


@pytest.mark.parametrize("family", [pytest.param(f, marks=unsloth) for f in FAMILIES])
@pytest.mark.parametrize("source", ["projection", "soft_embedding"])
def test_rollout_log_probs_equal_training_log_probs(family, source):
    found = run("families")["decoding"][f"{family} {source}"]
    assert 0.1 < found["thinking"] <= 1.0
    assert found["left_padded"] <= 1e-5 and found["left_packed"] <= 1e-5
    assert found["same_tokens"] and found["switches_restored"] and not found["is_inference"]


def test_a_stock_model_needs_nothing():
    model = tiny.model("llama")
    assert returning_hidden_states(model) is None
    with without_decode_graphs():
        assert model(torch.tensor([[3]])).logits.shape == (1, 1, 64)


def test_half_precision_scores_are_sampled_from_in_float32():
    """As transformers' own loop has it; the head multiplies in its own dtype."""
    seen, head = [], _Head.__new__(_Head)
    head.head, head.finish = nn.Linear(8, 20, bias=False, dtype=torch.bfloat16), lambda logits: 2 * logits
    head.see_hidden = lambda module, args: seen.append((module, args[0]))
    states = torch.randn(3, 8).to(torch.bfloat16)
    scores = head(torch.zeros(3, 1, dtype=torch.long), states.float())
    assert scores.dtype == torch.float32 and torch.equal(scores, (2 * head.head(states)).float())
    ((module, hidden),) = seen
    assert module is head.head and torch.equal(hidden, states[:, None])
    with pytest.raises(RuntimeError, match=r"scores \(3, 20\), not hidden states \(B, 8\)"):
        head(torch.zeros(3, 1, dtype=torch.long), scores)
