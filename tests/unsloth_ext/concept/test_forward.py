"""The parallel forward against the literal one: of every position anew, concepts and tail as one short causal text."""

import functools

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from tests import tiny
from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.concept import flex_attention, forward
from unsloth_ext.concept.config import OnlineConceptConfig
from unsloth_ext.concept.modules import attach_concepts


FAMILIES = ("llama", "qwen2", "qwen3")
V = 12
T = 11


def model(family, split=(2, 2, 1), dtype=torch.float64, **settings):
    config = tiny.config(family)
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": sum(split), "layer_types": None})
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config)
    attach_concepts(net, OnlineConceptConfig(*split, **{"num_concepts": V, **settings}))
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    net = net.to(dtype).eval()
    for module in net.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = functools.partial(norm, module)
    return net


def norm(module, x):
    """As theirs, without the step through fp32."""
    return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)


def states(net, ids, concepts=None, mask=None, positions=None):
    """Normed hidden states of the decoder, all positions at once."""
    out = backbone_of(net)(ids, attention_mask=mask, position_ids=positions, concepts=concepts, use_cache=False)
    return out.last_hidden_state


def causal(net, layers, hidden, positions):
    """Layers as transformers' own model runs them: no mask given, SDPA's causal one."""
    backbone = backbone_of(net)
    rotary = backbone.rotary_emb(hidden, position_ids=positions)
    for i in layers:
        hidden = backbone.layers[i](hidden, position_embeddings=rotary, position_ids=positions)
    return hidden


def literal(net, ids, concepts):
    """One row (T,): logits (T, vocabulary)."""
    backbone = backbone_of(net)
    shallow, middle, deep = backbone.concept_config.parts
    config, out = backbone.concept_config, []
    concepts = concepts.view(len(ids), -1)
    for t in range(len(ids)):
        tokens = causal(net, shallow, backbone.embed_tokens(ids[None, : t + 1]), torch.arange(t + 1)[None])[0]
        kept = [i for i in range(t + 1) if concepts[i, 0] != config.null]
        tail = list(range(kept[-1] + (not config.boundary_keeps_token) if kept else 0, t + 1))
        slots = [tokens[tail]]
        if kept:
            read = backbone.concept_embedding(concepts[kept])[None]
            slots.insert(0, causal(net, middle, read, torch.tensor([kept]))[0])
        last = causal(net, deep, torch.cat(slots)[None], torch.tensor([[*kept, *tail]]))[0, -1]
        out.append(net.lm_head(backbone.norm(last)))
    return torch.stack(out)


def patterns():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (6, T), generator=generator)
    random = torch.rand(6, T, generator=generator)
    concepts = torch.where(random < torch.tensor([0.2, 0.5, 0.8, -1.0, 2.0, 0.3])[:, None], ids, V)
    concepts[5, -1] = 3  # the tail is empty at the last token
    return concepts  # the fourth row all <NULL>, the fifth all concepts


def codewords(concepts, number):
    """The same concepts with more codewords each, (B, T, C)."""
    more = torch.randint(0, V, (*concepts.shape, number - 1), generator=torch.Generator().manual_seed(6))
    return torch.cat([concepts[..., None], more], dim=-1)


@pytest.mark.parametrize(
    "split, settings",
    [
        ((1, 1, 1), {}),
        ((2, 2, 1), {"boundary_keeps_token": True}),
        ((1, 3, 2), {"num_codebooks": 3}),
        ((2, 1, 2), {"boundary_keeps_token": True, "num_codebooks": 2}),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_is_literal(family, split, settings):
    """1e-10 in fp64: values, and gradients of every parameter."""
    net, concepts = model(family, split, **settings), patterns()
    concepts = codewords(concepts, settings.get("num_codebooks", 1))
    ids = torch.randint(3, 60, concepts.shape[:2], generator=torch.Generator().manual_seed(2))
    weights = torch.randn(*ids.shape, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = net.lm_head(states(net, ids, concepts))
    wanted = torch.stack([literal(net, *row) for row in zip(ids, concepts)])
    assert (found - wanted).abs().max() <= 1e-10
    read = {n: p for n, p in net.named_parameters() if "concept_head" not in n}
    gradients = [torch.autograd.grad((x * weights).sum(), list(read.values())) for x in (found, wanted)]
    for name, ours, plain in zip(read, *gradients):
        assert (ours - plain).abs().max() <= 1e-10 * max(1, plain.abs().max()), name
        assert plain.abs().max() > 0, name


def test_single_precision():
    """1e-5 of the largest logit."""
    net, concepts = model("qwen3", dtype=torch.float32), patterns()
    ids = torch.randint(3, 60, concepts.shape, generator=torch.Generator().manual_seed(2))
    found = net.lm_head(states(net, ids, concepts))
    wanted = torch.stack([literal(net, *row) for row in zip(ids, concepts)])
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_are_the_rows_alone(side, keeps):
    """1e-10; whatever pads hold, concepts among it."""
    net, concepts = model("qwen3", boundary_keeps_token=keeps), patterns()
    ids = torch.randint(3, 60, concepts.shape, generator=torch.Generator().manual_seed(2))
    lengths = [11, 4, 7, 1, 9, 6]
    mask = torch.stack([torch.arange(T) < n if side == "right" else torch.arange(T) >= T - n for n in lengths])
    together = states(net, ids, concepts, mask)
    for i, row in enumerate(mask):
        alone = states(net, ids[i : i + 1, row], concepts[i : i + 1, row])
        assert (together[i : i + 1, row] - alone).abs().max() <= 1e-10


@pytest.mark.parametrize("keeps", [False, True])
def test_packed_texts_are_the_texts_alone(keeps):
    """1e-10: two rows one behind the other, with positions of their own."""
    net, concepts = model("qwen3", boundary_keeps_token=keeps), patterns()
    ids = torch.randint(3, 60, concepts.shape, generator=torch.Generator().manual_seed(2))
    alone = states(net, ids, concepts)
    for first, second in ((0, 1), (4, 3), (2, 5)):
        rows = [first, second]
        positions = torch.arange(T).repeat(2)[None]
        packed = states(net, ids[rows].flatten()[None], concepts[rows].flatten()[None], positions=positions)
        assert (packed.view(2, T, -1) - alone[rows]).abs().max() <= 1e-10


@pytest.mark.parametrize("keeps", [False, True])
def test_what_comes_later_changes_nothing(keeps):
    """Exactly as far as kernels round alike: 1e-12, for every position, tokens and concepts."""
    net, concepts = model("qwen3", boundary_keeps_token=keeps), patterns()
    ids = torch.randint(3, 60, concepts.shape, generator=torch.Generator().manual_seed(2))
    before = states(net, ids, concepts)
    for t in range(1, T):
        other, chosen = ids.clone(), concepts.clone()
        other[:, t:] = 63 - other[:, t:]
        chosen[:, t:] = torch.where(chosen[:, t:] == V, 5, V)
        after = states(net, other, chosen)
        assert (after[:, :t] - before[:, :t]).abs().max() <= 1e-12
        assert (after[:, t:] - before[:, t:]).abs().max() > 1e-3


def dense(query, key, value, block_mask, scale, enable_gqa):
    """What FlexAttention computes from the mask's rule, with a backward, which it has not on a CPU."""
    rows, slots = query.shape[0], torch.arange(query.shape[2])
    mask = block_mask.mask_mod(torch.arange(rows)[:, None, None, None], 0, slots[:, None], slots)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=enable_gqa)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("rows", ["whole", "ragged", "packed"])
@pytest.mark.parametrize("keeps", [False, True])
def test_flex_attention_is_sdpa(monkeypatch, rows, keeps, backward):
    """1e-10 in fp64, concepts first against slots in place; values by FlexAttention itself, gradients of every parameter
    by a stand-in for its kernel."""
    net, concepts = model("qwen3", boundary_keeps_token=keeps), patterns()
    ids = torch.randint(3, 60, concepts.shape, generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    positions = None
    if rows == "ragged":
        mask[:3, :4], mask[3:5, 6:] = 0, 0
    if rows == "packed":
        mask, positions = None, torch.cat([torch.arange(7), torch.arange(T - 7)]).expand(6, -1)
    real = 1 if mask is None else mask[..., None]
    weights = torch.randn(*ids.shape, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * real
    read = {n: p.requires_grad_(backward) for n, p in net.named_parameters() if "concept_head" not in n}

    def run():
        out = states(net, ids, concepts, mask, positions)
        return out, torch.autograd.grad(
            (out * weights).sum(), list(read.values()), allow_unused=True
        ) if backward else []

    with torch.set_grad_enabled(backward):
        wanted, plain = run()
        asked = []
        monkeypatch.setattr(forward, "flex_from", lambda hidden: asked.append(hidden.shape) or True)
        if backward:
            monkeypatch.setattr(flex_attention, "kernel", lambda device: dense)
        found, ours = run()
    assert asked and ((found - wanted) * real).abs().max() <= 1e-10
    for name, one, other in zip(read, ours, plain):
        assert (one is None) == (other is None) and (one is None or (one - other).abs().max() <= 1e-10), name


def test_without_concepts_the_middle_is_skipped_and_nothing_else():
    """All `<NULL>`: shallow and deep layers as a model of these alone, 1e-12."""
    net = model("llama", (1, 1, 1))
    ids = torch.randint(3, 60, (2, T), generator=torch.Generator().manual_seed(2))
    found = states(net, ids, torch.full_like(ids, V))
    backbone = backbone_of(net)
    del backbone.layers[1], backbone.forward
    backbone.config.num_hidden_layers = 2
    assert (found - backbone(ids, use_cache=False).last_hidden_state).abs().max() <= 1e-12


def test_what_cannot_be_is_named():
    net = tiny.model("qwen3")
    with pytest.raises(ValueError, match="together 28, the model has 2 layers"):
        attach_concepts(net)
    with pytest.raises(ValueError, match="n_middle=0"):
        OnlineConceptConfig(1, 0, 1)
    with pytest.raises(ValueError, match="already has the concepts"):
        attach_concepts(model("qwen3"), OnlineConceptConfig(2, 2, 1))
