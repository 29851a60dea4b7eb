"""Segmenters against a loop over tokens that keeps their state by hand, and in pieces against whole texts."""

import math

import pytest
import torch

from unsloth_ext.concept.config import OnlineConceptConfig
from unsloth_ext.concept.segmenters import Memory, boundaries


N = 40
LIMITS = ({}, {"max_tail": 3}, {"max_nulls": 7}, {"max_tail": 5, "max_nulls": 11})
RULES = [
    *((name, limits) for name in ("null", "threshold", "entropy") for limits in LIMITS),
    ("fixed", {"stride": 4, "concepts_per_stride": 1}),
    ("fixed", {"stride": 5, "concepts_per_stride": 2}),
    ("autoregressive", {"max_tail": 1}),
    ("autoregressive", {"max_tail": 6}),
    ("autoregressive", {"max_tail": 6, "max_nulls": 9}),
]


def by_hand(config, score, length_logits):
    """One text (n,): which tokens are concepts, and the length that each would end."""
    concept, lengths, since, nulls, charge = [], [], 0, 0, 0.0
    for t, s in enumerate(score.tolist()):
        before, charge = charge, charge + 1 / (1 + math.exp(-s))
        length = since + 1
        ends = {
            "null": s > 0,
            "entropy": s > 0,
            "threshold": math.floor(charge) > math.floor(before),
            "fixed": t % config.stride >= config.stride - config.concepts_per_stride,
            "autoregressive": length == config.max_tail
            or (length <= len(length_logits) and s + length_logits[min(length, len(length_logits)) - 1] > 0),
        }[config.segmenter]
        ends = ends or length == config.max_tail or (config.max_nulls is not None and nulls == config.max_nulls)
        concept.append(bool(ends))
        lengths.append(length)
        since, nulls = (0, nulls) if ends else (length, nulls + 1)
    return concept, lengths


def scores(mean):
    return torch.randn(6, N, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 2 + mean


def length_logits(most):
    return torch.randn(most, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("mean", [-3.0, -1.0, 2.0])
@pytest.mark.parametrize("rule, limits", RULES)
def test_texts_of_any_length_are_decided_as_by_hand(rule, limits, mean):
    """Exactly; rows of 40, 1, 17, 0, 39 and 2 tokens."""
    config, score = OnlineConceptConfig(segmenter=rule, **limits), scores(mean)
    logits = length_logits(config.max_tail or 1)
    valid = torch.arange(N) < torch.tensor([40, 1, 17, 0, 39, 2])[:, None]
    concept, length, _ = boundaries(config, score, valid, Memory.empty(6, score.device), logits)
    assert not concept[~valid].any()
    for row, used in enumerate(valid):
        assert (concept[row, used].tolist(), length[row, used].tolist()) == by_hand(config, score[row, used], logits)
    assert concept.any()


@pytest.mark.parametrize("rule, limits", RULES)
def test_pieces_are_the_whole(rule, limits):
    """Token by token, and in pieces of 3, 1, 16 and 20: exactly what the whole text is, and the same memory of it."""
    config, score = OnlineConceptConfig(segmenter=rule, **limits), scores(-1.0)
    logits = length_logits(config.max_tail or 1)
    valid = torch.ones_like(score, dtype=torch.bool)
    whole = boundaries(config, score, valid, Memory.empty(6, score.device), logits)
    for sizes in ([1] * N, [3, 1, 16, 20]):
        memory, found = Memory.empty(6, score.device), []
        for part, used in zip(score.split(sizes, 1), valid.split(sizes, 1)):
            concept, length, memory = boundaries(config, part, used, memory, logits)
            found.append((concept, length))
        assert torch.cat([c for c, _ in found], 1).equal(whole[0]) and torch.cat([n for _, n in found], 1).equal(
            whole[1]
        )
        for name in ("position", "since", "nulls"):
            assert getattr(memory, name).equal(getattr(whole[2], name))
        assert (memory.charge - whole[2].charge).abs().max() <= 1e-12


def test_rows_without_new_tokens_remember_what_they_did():
    config, score = OnlineConceptConfig(segmenter="threshold", max_tail=4), scores(-1.0)
    memory = boundaries(config, score, torch.ones_like(score, dtype=torch.bool), Memory.empty(6, score.device))[2]
    after = boundaries(config, score, torch.zeros_like(score, dtype=torch.bool), memory)[2]
    for name in ("position", "since", "nulls", "charge"):
        assert getattr(after, name).equal(getattr(memory, name))


@pytest.mark.parametrize(
    "field, value, others",
    [
        ("n_middle", 0, {}),
        ("num_codebooks", 0, {}),
        ("segmenter", "words", {}),
        ("gate", "soft", {}),
        ("max_tail", 0, {}),
        ("max_nulls", -1, {}),
        ("concepts_per_stride", 5, {}),
        ("segmenter", "autoregressive", {}),
        ("segmenter", "fixed", {"max_tail": 3}),
    ],
)
def test_settings_that_cannot_be_are_named(field, value, others):
    with pytest.raises(ValueError, match=f"{field}='?{value}"):
        OnlineConceptConfig(**{field: value}, **others)
