"""Parameters as published, and the rotary frequencies of YaRN against its definition."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from unsloth_ext import minimind_config


@pytest.mark.parametrize(
    "name, millions, active",
    [
        ("minimind2-small", 25.83, None),
        ("minimind2", 104.03, None),
        ("minimind2-moe", 145.03, None),
        ("minimind3", 63.91, None),
        ("minimind3-moe", 198.42, 63.94),
    ],
)
def test_parameters_are_as_many_as_published(name, millions, active):
    """To the last published digit."""
    config = minimind_config(name)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config)
    assert round(net.num_parameters() / 1e6, 2) == millions
    if active:
        idle = sum(p.numel() for n, p in net.named_parameters() if ".experts." in n) * 3 // 4  # three experts of four
        assert round((net.num_parameters() - idle) / 1e6, 2) == active


@pytest.mark.parametrize("name", ["minimind2-small", "minimind3"])
def test_yarn_stretches_sixteen_times(name):
    """1e-6: frequencies below the ramp as they are, above it a sixteenth, between them mixed."""
    config = minimind_config(name, yarn=True)
    assert config.max_position_embeddings == 16 * 2048
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    width = config.hidden_size // 8
    plain = 1e6 ** (-torch.arange(0, width, 2).float() / width)

    def turns(beta):
        return width * math.log(2048 / (beta * 2 * math.pi)) / (2 * math.log(1e6))

    low, high = max(math.floor(turns(32)), 0), min(math.ceil(turns(1)), width - 1)
    ramp = ((torch.arange(width // 2) - low) / (high - low)).clamp(0, 1)
    assert (rotary.inv_freq / (plain * (1 - ramp) + plain / 16 * ramp) - 1).abs().max() <= 1e-6
    assert rotary.attention_scaling == 1.0


def test_no_such_preset():
    with pytest.raises(ValueError, match="no MiniMind preset 'minimind9'; there are minimind2-small"):
        minimind_config("minimind9")
