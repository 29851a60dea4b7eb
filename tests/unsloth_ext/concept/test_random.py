"""Splits, boundaries, padding and settings drawn at random: the literal loop, the parallel forward, and decoding agree."""

import random

import pytest
import torch

from .test_decoding import prefill, step
from .test_forward import FAMILIES, V, codewords, literal, model, states


@pytest.mark.parametrize("seed", range(12))
def test_loop_parallel_and_decoding_agree(seed):
    """1e-10 in fp64."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    split = tuple(rng.randint(1, 3) for _ in range(3))
    books, keeps, rows, width = rng.randint(1, 3), rng.random() < 0.5, rng.randint(1, 4), rng.randint(2, 19)
    net = model(rng.choice(FAMILIES), split, boundary_keeps_token=keeps, num_codebooks=books)
    rate = torch.rand(rows, 1, generator=generator)
    drawn = torch.randint(0, V, (rows, width), generator=generator)
    concepts = codewords(torch.where(torch.rand(rows, width, generator=generator) < rate, drawn, V), books)
    ids = torch.randint(3, 60, (rows, width), generator=generator)
    lengths = torch.tensor([rng.randint(1, width) for _ in range(rows)])
    places = torch.arange(width)
    mask = places < lengths[:, None] if rng.random() < 0.5 else places >= width - lengths[:, None]
    together = states(net, ids, concepts, mask)
    for row in range(rows):
        real = mask[row]
        wanted = literal(net, ids[row, real], concepts[row, real])
        assert (net.lm_head(together[row, real]) - wanted).abs().max() <= 1e-10
    prompt = rng.randint(1, width)
    whole = states(net, ids, concepts)
    found, cache = prefill(net, ids[:, :prompt], concepts[:, :prompt])
    assert (found - whole[:, :prompt]).abs().max() <= 1e-10
    for t in range(prompt, width):
        assert (step(net, cache, ids[:, t], concepts[:, t]) - whole[:, t]).abs().max() <= 1e-10
