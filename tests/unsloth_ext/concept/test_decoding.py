"""Prefill and decode against the parallel forward, row by row and in batches whose rows emit at different times."""

from itertools import pairwise

import pytest
import torch

from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.concept import forward

from .test_forward import FAMILIES, T, V, codewords, model, patterns, states


def texts(concepts):
    return torch.randint(3, 60, concepts.shape[:2], generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def prefill(net, ids, concepts=None, mask=None):
    """States (B, T, d) and the cache."""
    out = backbone_of(net)(ids, attention_mask=mask, concepts=concepts, use_cache=True)
    return out.last_hidden_state, out.past_key_values


@torch.no_grad()
def step(net, cache, ids, concepts=None):
    """States (B, d) of one more token (B,) a row."""
    chosen = None if concepts is None else concepts[:, None]
    return backbone_of(net)(ids[:, None], past_key_values=cache, concepts=chosen).last_hidden_state[:, 0]


@pytest.mark.parametrize("settings", [{}, {"boundary_keeps_token": True, "num_codebooks": 2}])
@pytest.mark.parametrize("prompt", [1, 4, T - 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_and_decode_are_the_parallel_forward(family, prompt, settings):
    """1e-10 in fp64; two to all rows emit at the same time, or none."""
    net, concepts = model(family, **settings), codewords(patterns(), settings.get("num_codebooks", 1))
    ids = texts(concepts)
    wanted = states(net, ids, concepts)
    found, cache = prefill(net, ids[:, :prompt], concepts[:, :prompt])
    assert (found - wanted[:, :prompt]).abs().max() <= 1e-10
    for t in range(prompt, T):
        assert (step(net, cache, ids[:, t], concepts[:, t]) - wanted[:, t]).abs().max() <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize(
    "training, asked, configured, kept",
    [
        (False, True, False, True),
        (False, False, True, False),
        (False, None, True, True),
        (False, None, False, False),
        (True, True, True, False),
        (True, None, True, False),
    ],
)
def test_a_cache_is_made_where_it_is_asked_for_and_never_in_training(training, asked, configured, kept):
    backbone = backbone_of(model("qwen3").train(training))
    backbone.config.use_cache = configured
    out = backbone(torch.tensor([[3, 4, 5]]), use_cache=asked)
    assert (out.past_key_values is not None) == kept


def test_one_more_token_takes_the_quick_way(monkeypatch):
    """It is what decoding's rate rests on: no forward of whole texts."""
    net, concepts = model("qwen3"), patterns()
    _, cache = prefill(net, texts(concepts)[:, :4], concepts[:, :4])
    monkeypatch.setattr(forward, "parallel", lambda *_: pytest.fail("the way of several tokens"))
    step(net, cache, texts(concepts)[:, 4], concepts[:, 4])


@torch.no_grad()
@pytest.mark.parametrize("settings", [{}, {"boundary_keeps_token": True, "num_codebooks": 2}])
@pytest.mark.parametrize("cuts", [(4,), (1, 2, 5, 6, 9), (2, 3, 8)])
def test_several_tokens_at_once_go_on_from_a_cache(cuts, settings):
    """1e-10, as a conversation does: pieces of one and of several tokens."""
    net, concepts = model("qwen3", **settings), codewords(patterns(), settings.get("num_codebooks", 1))
    ids = texts(concepts)
    _, cache = prefill(net, ids[:, : cuts[0]], concepts[:, : cuts[0]])
    pieces = [
        backbone_of(net)(ids[:, a:b], past_key_values=cache, concepts=concepts[:, a:b]).last_hidden_state
        for a, b in pairwise((*cuts, T))
    ]
    assert (torch.cat(pieces, dim=1) - states(net, ids, concepts)[:, cuts[0] :]).abs().max() <= 1e-10
    _, once = prefill(net, ids, concepts)
    assert cache.num_bytes() == once.num_bytes() and cache.seen == once.seen
    assert all(a.lengths.equal(b.lengths) for a, b in zip(cache.layers, once.layers, strict=True))


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_prompts_go_on_as_alone(side, keeps):
    """1e-10: prompts of 5, 1, 3, 5, 2 and 4 tokens, six more tokens each."""
    net, concepts = model("qwen3", boundary_keeps_token=keeps), patterns()
    ids, lengths = texts(concepts), [5, 1, 3, 5, 2, 4]
    mask = torch.stack([torch.arange(5) < n if side == "right" else torch.arange(5) >= 5 - n for n in lengths])
    prompts, chosen = torch.zeros(6, 5, dtype=torch.long), torch.full((6, 5), 7)
    for i, n in enumerate(lengths):
        prompts[i, mask[i]], chosen[i, mask[i]] = ids[i, :n], concepts[i, :n]
    _, cache = prefill(net, prompts, chosen, mask)
    starts = torch.tensor(lengths)
    both = torch.arange(6)[:, None], starts[:, None] + torch.arange(2)
    found = backbone_of(net)(ids[both], past_key_values=cache, concepts=concepts[both]).last_hidden_state
    for i, n in enumerate(lengths):  # two tokens at once, then four more
        alone = states(net, ids[i : i + 1, : n + 2], concepts[i : i + 1, : n + 2])
        assert (found[i] - alone[0, -2:]).abs().max() <= 1e-10
    for i_step in range(2, 6):
        at = (torch.arange(6), starts + i_step)
        found = step(net, cache, ids[at], concepts[at])
        for i, n in enumerate(lengths):
            alone = states(net, ids[i : i + 1, : n + i_step + 1], concepts[i : i + 1, : n + i_step + 1])
            assert (found[i] - alone[0, -1]).abs().max() <= 1e-10


@pytest.mark.parametrize("keeps", [False, True])
def test_the_caches_hold_what_they_should(keeps):
    """Shallow every token, middle the concepts, deep the concepts and the tail."""
    net, concepts = model("qwen3", boundary_keeps_token=keeps), patterns()
    ids = texts(concepts)
    _, cache = prefill(net, ids[:, :4], concepts[:, :4])
    for t in range(4, T):
        step(net, cache, ids[:, t], concepts[:, t])
        made = concepts[:, : t + 1] != V
        tail = (made.flip(1).cumsum(1) == 0).sum(1) + (made.any(1) if keeps else 0)
        shallow, middle, deep = (layers.lengths for layers in cache.layers)
        assert shallow.eq(t + 1).all() and middle.equal(made.sum(1)) and deep.equal(made.sum(1) + tail)
        slots = 2 * shallow.sum() + 2 * middle.sum() + deep.sum()  # layers of each part
        assert cache.num_bytes() == slots * 2 * 2 * 8 * 8  # keys and values, heads, width, fp64


def test_other_rows_of_a_cache_go_on_as_their_own():
    """1e-10: rows chosen, doubled and reordered, as beam search does."""
    net, concepts = model("qwen3"), patterns()
    ids = texts(concepts)
    wanted = states(net, ids, concepts)
    _, cache = prefill(net, ids[:, :6], concepts[:, :6])
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 11, 10]))
    rows = [1, 0, 5, 5]
    for t in range(6, T):
        found = step(net, cache, ids[rows, t], concepts[rows, t])
        assert (found - wanted[rows, t]).abs().max() <= 1e-10


SEGMENTERS = [
    {"segmenter": "null"},
    {"segmenter": "null", "gate": "factorised", "max_tail": 3},
    {"segmenter": "null", "gate": "factorised", "max_nulls": 4, "num_codebooks": 2},
    {"segmenter": "threshold", "max_tail": 4},
    {"segmenter": "fixed", "stride": 3, "concepts_per_stride": 2},
    {"segmenter": "entropy", "boundary_keeps_token": True},
    {"segmenter": "autoregressive", "max_tail": 5},
]


def undecided(net, ids):
    """Let half of the tokens fire by themselves, and none be undecided."""
    backbone = backbone_of(net)
    with torch.no_grad():
        if backbone.concept_head.length_logits is not None:
            backbone.concept_head.length_logits.copy_(torch.linspace(-1, 1, 5))
        probability = backbone(ids, use_cache=False).choice.probability
        literal = backbone.concept_config.gate == "literal" and backbone.concept_config.segmenter == "null"
        logits = backbone(ids, use_cache=False).choice.logits
        ahead = logits[..., :V].amax(-1) - logits[..., -1] if literal else probability.logit()
        ahead = ahead.flatten().sort().values
        backbone.concept_head.bias[-1] += ahead[len(ahead) // 2 - 1 : len(ahead) // 2 + 1].mean()


@pytest.mark.parametrize("settings", SEGMENTERS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_gate_decides_alike_in_training_and_decoding(family, settings):
    """The same concepts in parallel, ragged, prefill and decode; states to 1e-10. With the factorised gate also in training
    mode, where only which concept is sampled."""
    net = model(family, **settings)
    ids, backbone = texts(patterns()), backbone_of(net)
    undecided(net, ids)
    whole = backbone(ids, use_cache=False)
    made = whole.choice.concept
    assert 0.1 < made.float().mean() < 0.9
    given = torch.where(made[..., None], whole.choice.ids, V)
    assert (states(net, ids, given) - whole.last_hidden_state).abs().max() <= 1e-10
    if settings.get("gate") == "factorised" or settings["segmenter"] != "null":
        assert backbone.train()(ids).choice.concept.equal(made)
        backbone.eval()
    for prompt in (1, 5):
        out = backbone(ids[:, :prompt], use_cache=True)
        for t in range(prompt, T):
            step_out = backbone(ids[:, t : t + 1], past_key_values=out.past_key_values)
            assert step_out.choice.concept[:, 0].equal(made[:, t])
            assert step_out.choice.ids[:, 0].equal(whole.choice.ids[:, t])
            assert (step_out.last_hidden_state[:, 0] - whole.last_hidden_state[:, t]).abs().max() <= 1e-10
    out, pieces = backbone(ids[:, :2], use_cache=True), []
    for a, b in pairwise((2, 5, 6, T)):
        pieces.append(backbone(ids[:, a:b], past_key_values=out.past_key_values))
        assert pieces[-1].choice.concept.equal(made[:, a:b]) and pieces[-1].choice.ids.equal(whole.choice.ids[:, a:b])
    together = torch.cat([piece.last_hidden_state for piece in pieces], dim=1)
    assert (together - whole.last_hidden_state[:, 2:]).abs().max() <= 1e-10
    for side in ("left", "right"):
        mask = torch.ones_like(ids)
        mask[::2, slice(0, 3) if side == "left" else slice(T - 3, T)] = 0
        shifted = ids.clone()
        if side == "left":
            shifted[::2, 3:] = ids[::2, : T - 3]
        out = backbone(shifted, attention_mask=mask, use_cache=False)
        assert out.choice.concept[1::2].equal(made[1::2])
        at = slice(3, T) if side == "left" else slice(0, T - 3)
        assert out.choice.concept[::2, at].equal(made[::2, : T - 3])
        assert (out.last_hidden_state[::2, at] - whole.last_hidden_state[::2, : T - 3]).abs().max() <= 1e-10
    positions = torch.cat([torch.arange(T), torch.arange(T)])[None]
    packed = backbone(ids[:2].flatten()[None], position_ids=positions, use_cache=False)
    assert packed.choice.concept.view(2, T).equal(made[:2])
    assert (packed.last_hidden_state.view(2, T, -1) - whole.last_hidden_state[:2]).abs().max() <= 1e-10
