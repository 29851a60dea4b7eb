"""Hybrid decoding under Unsloth: what was sampled is what training scores."""

import importlib.util

import pytest
import torch

from tests import tiny
from tests.unsloth_scripts import run
from unsloth_ext.unsloth_decoding import returning_hidden_states, without_decode_graphs


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
