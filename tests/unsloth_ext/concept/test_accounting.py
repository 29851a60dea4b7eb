"""What is counted against what torch counts, and against the figures of the method's theory."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config

from unsloth_ext import OnlineConceptConfig, backbone_of
from unsloth_ext.concept.accounting import Cost, cost, equal_depth

from .test_forward import FAMILIES, model


def test_qwen3_of_0_6b():
    """(4, 20, 4) at R = 4: 0.61 of the multiplications and 0.36 of the keys and values, as 13 of 28 layers cost."""
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
    )
    ours, whole = cost(config, OnlineConceptConfig(), 4.0), cost(config)
    assert ours.macs / whole.macs == pytest.approx(0.61, abs=0.005)
    assert ours.kv / whole.kv == pytest.approx(0.36, abs=0.005)
    assert equal_depth(config, OnlineConceptConfig(), 4.0) == 13


@pytest.mark.parametrize(
    "settings", [None, {}, {"boundary_keeps_token": True, "num_codebooks": 2}, {"segmenter": "entropy"}]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_multiplications_are_those_that_are_made(family, settings):
    """Exactly, of 24 tokens and 6 concepts: every product of the layers and the heads, by torch's counter."""
    net = model(family, (2, 2, 1), torch.float32, **{"segmenter": "fixed", "stride": 4, **(settings or {})})
    if settings is None:
        del backbone_of(net).forward
    if (settings or {}).get("segmenter") == "entropy":
        backbone_of(net).concept_gate.segment_as = OnlineConceptConfig(segmenter="fixed", stride=4)
    ids = torch.randint(3, 60, (1, 24))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(ids, use_cache=False)
    found = sum(
        n for op, n in counter.get_flop_counts()["Global"].items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    concepts = None if settings is None else backbone_of(net).concept_config
    wanted = cost(net.config, concepts, 4.0)
    assert found / 2 / 24 == wanted.macs


@pytest.mark.parametrize("keeps", [False, True])
def test_attention_is_of_the_slots_that_are_seen(keeps):
    """To 1%, of 4,000 tokens and 1,000 concepts, counted one by one: two products of a query's width for each."""
    net, tokens = model("qwen3", (2, 2, 1), segmenter="fixed", stride=4, boundary_keeps_token=keeps), 4000
    shallow = middle = deep = concepts = tail = 0
    for t in range(tokens):
        shallow, tail = shallow + t + 1, tail + 1
        if t % 4 < 3:
            deep += concepts + tail
            continue
        concepts, tail = concepts + 1, 0
        middle, deep = middle + concepts, deep + concepts * (2 if keeps else 1)  # with its token, which begins the tail
        if keeps:
            tail, deep = 1, deep + 1
    queries = net.config.num_attention_heads * net.config.head_dim
    found = cost(net.config, backbone_of(net).concept_config, 4.0, tokens).attention
    assert found == pytest.approx(2 * queries * (2 * shallow + 2 * middle + deep) / tokens, rel=0.01)
    assert cost(net.config, tokens=tokens).attention == pytest.approx(2 * queries * 5 * shallow / tokens, rel=0.01)


def test_keys_and_values_are_those_that_are_held():
    """To 2%, after a text of 40: the tail is counted as half a stride long."""
    net = model("qwen3", segmenter="fixed", stride=4)
    ids = torch.randint(3, 60, (1, 40))
    held = net(ids, use_cache=True).past_key_values.num_bytes() / 8 / 40
    config = backbone_of(net).concept_config
    assert held == pytest.approx(cost(net.config, config, 4.0, 40).kv, rel=0.02)
    assert cost(net.config, config, 4.0, 40) == cost(net.config, config, 4.0, 40, tail=(0 + 1 + 2 + 3) / 4)


def test_a_long_tail_costs_keys_and_values():
    """One concept for every 4 tokens, all at the beginning: the deep layer holds the rest of the text."""
    net = model("qwen3", segmenter="null")
    concepts = torch.full((1, 40), 12)
    concepts[0, :10] = 3
    ids = torch.randint(3, 60, (1, 40))
    backbone_of(net)(ids, concepts=concepts, use_cache=True)
    held = backbone_of(net)(ids, concepts=concepts, use_cache=True).past_key_values.num_bytes() / 8 / 40
    config = backbone_of(net).concept_config
    assert held == pytest.approx(cost(net.config, config, 4.0, 40, tail=30).kv, rel=1e-6)
    assert held > 1.1 * cost(net.config, config, 4.0, 40).kv


def test_all_work_is_the_sum_of_its_parts():
    assert Cost(layers=1.0, attention=2.0, lm_head=4.0, concept_head=8.0, kv=16.0).macs == 15.0
