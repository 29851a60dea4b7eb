"""Prefill and decode against the parallel forward, row by row and in batches whose rows emit at different times."""

import pytest
import torch

from unsloth_ext.concept.decoding import ConceptDecoder
from unsloth_ext.concept.forward import parallel_forward
from unsloth_ext.concept.gate import likeliest
from unsloth_ext.residual import backbone_of

from .test_forward import FAMILIES, T, V, model, patterns


def texts(concepts):
    return torch.randint(3, 60, concepts.shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("prompt", [1, 4, T - 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_are_the_parallel_forward(family, prompt):
    """1e-10 in fp64; two to all rows emit at the same time, or none."""
    net, concepts = model(family), patterns()
    ids = texts(concepts)
    wanted = parallel_forward(net, ids, concepts).last_hidden_state
    decoder = ConceptDecoder.prefill(net, ids[:, :prompt], concepts[:, :prompt])
    assert (decoder.last_hidden_state - wanted[:, prompt - 1]).abs().max() <= 1e-10
    for t in range(prompt, T):
        found = decoder.step(ids[:, t], concepts[:, t])
        assert (found - wanted[:, t]).abs().max() <= 1e-10


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_prompts_go_on_as_alone(side):
    """1e-10: prompts of 5, 1, 3, 5, 2 and 4 tokens, six more tokens each."""
    net, concepts = model("qwen3"), patterns()
    ids, lengths = texts(concepts), [5, 1, 3, 5, 2, 4]
    mask = torch.stack([torch.arange(5) < n if side == "right" else torch.arange(5) >= 5 - n for n in lengths])
    prompts, chosen = torch.zeros(6, 5, dtype=torch.long), torch.full((6, 5), 7)
    for i, n in enumerate(lengths):
        prompts[i, mask[i]], chosen[i, mask[i]] = ids[i, :n], concepts[i, :n]
    decoder = ConceptDecoder.prefill(net, prompts, chosen, mask)
    starts = torch.tensor(lengths)
    for step in range(6):
        at = (torch.arange(6), starts + step)
        found = decoder.step(ids[at], concepts[at])
        for i, n in enumerate(lengths):
            alone = parallel_forward(net, ids[i : i + 1, : n + step + 1], concepts[i : i + 1, : n + step + 1])
            assert (found[i] - alone.last_hidden_state[0, -1]).abs().max() <= 1e-10


def test_the_caches_hold_what_they_should():
    """Shallow every token, middle the concepts, deep the concepts and the tail."""
    net, concepts = model("qwen3"), patterns()
    ids = texts(concepts)
    decoder = ConceptDecoder.prefill(net, ids[:, :4], concepts[:, :4])
    for t in range(4, T):
        decoder.step(ids[:, t], concepts[:, t])
        made = concepts[:, : t + 1] != V
        tail = (made.flip(1).cumsum(1) == 0).sum(1)
        shallow, middle, deep = (cache.lengths for cache in decoder.caches)
        assert shallow.eq(t + 1).all() and middle.equal(made.sum(1)) and deep.equal(made.sum(1) + tail)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_decides_alike_in_training_and_decoding(family):
    """The likeliest concept of every token: the same ids in parallel, prefill and decode, and states to 1e-10."""
    net = model(family)
    ids = texts(patterns())
    backbone, seen = backbone_of(net), []
    with torch.no_grad():  # half are <NULL>, and none is undecided
        logits = backbone.concept_head(parallel_forward(net, ids, torch.full_like(ids, V)).shallow)
        ahead = (logits[..., :-1].amax(-1) - logits[..., -1]).flatten().sort().values
        backbone.concept_head.bias[-1] += ahead[len(ahead) // 2 - 1 : len(ahead) // 2 + 1].mean()

    def choose(shallow):
        seen.append(likeliest(backbone, shallow))
        return seen[-1]

    wanted = parallel_forward(net, ids, choose).last_hidden_state
    chosen = seen.pop().ids
    assert 0.4 < (chosen == V).float().mean() < 0.6 and len(chosen.unique()) > 3
    decoder = ConceptDecoder.prefill(net, ids[:, :3], choose)
    assert seen.pop().ids.equal(chosen[:, :3])
    for t in range(3, T):
        assert (decoder.step(ids[:, t], choose) - wanted[:, t]).abs().max() <= 1e-10
        assert seen.pop().ids.equal(chosen[:, t])
