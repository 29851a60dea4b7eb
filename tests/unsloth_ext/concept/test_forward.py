"""The parallel forward against the literal one: of every position anew, concepts and tail as one short causal text."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from unsloth_ext.concept.forward import parallel_forward
from unsloth_ext.concept.modules import OnlineConceptConfig, attach_concepts
from unsloth_ext.residual import backbone_of


FAMILIES = ("llama", "qwen2", "qwen3")
V = 12
T = 11


def model(family, split=(2, 2, 1), dtype=torch.float64):
    config = tiny.config(family)
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": sum(split), "layer_types": None})
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config)
    attach_concepts(net, OnlineConceptConfig(*split, num_concepts=V))
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
    null, out = backbone.concept_config.null, []
    for t in range(len(ids)):
        tokens = causal(net, shallow, backbone.embed_tokens(ids[None, : t + 1]), torch.arange(t + 1)[None])[0]
        kept = [i for i in range(t + 1) if concepts[i] != null]
        tail = list(range(kept[-1] + 1 if kept else 0, t + 1))
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


@pytest.mark.parametrize("split", [(1, 1, 1), (2, 2, 1), (1, 3, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_parallel_is_literal(family, split):
    """1e-10 in fp64: values, and gradients of every parameter."""
    net, concepts = model(family, split), patterns()
    ids = torch.randint(3, 60, concepts.shape, generator=torch.Generator().manual_seed(2))
    weights = torch.randn(*ids.shape, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found = net.lm_head(parallel_forward(net, ids, concepts).last_hidden_state)
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
    found = net.lm_head(parallel_forward(net, ids, concepts).last_hidden_state)
    wanted = torch.stack([literal(net, *row) for row in zip(ids, concepts)])
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max()


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_rows_are_the_rows_alone(side):
    """1e-10; whatever pads hold, concepts among it."""
    net, concepts = model("qwen3"), patterns()
    ids = torch.randint(3, 60, concepts.shape, generator=torch.Generator().manual_seed(2))
    lengths = [11, 4, 7, 1, 9, 6]
    mask = torch.stack([torch.arange(T) < n if side == "right" else torch.arange(T) >= T - n for n in lengths])
    together = parallel_forward(net, ids, concepts, mask).last_hidden_state
    for i, row in enumerate(mask):
        alone = parallel_forward(net, ids[i : i + 1, row], concepts[i : i + 1, row]).last_hidden_state
        assert (together[i : i + 1, row] - alone).abs().max() <= 1e-10


def test_packed_texts_are_the_texts_alone():
    """1e-10: two rows one behind the other, with positions of their own."""
    net, concepts = model("qwen3"), patterns()
    ids = torch.randint(3, 60, concepts.shape, generator=torch.Generator().manual_seed(2))
    alone = parallel_forward(net, ids, concepts).last_hidden_state
    for first, second in ((0, 1), (4, 3), (2, 5)):
        rows = [first, second]
        positions, documents = torch.arange(T).repeat(2)[None], torch.arange(2).repeat_interleave(T)[None]
        packed = parallel_forward(
            net, ids[rows].flatten()[None], concepts[rows].flatten()[None], position_ids=positions, documents=documents
        )
        assert (packed.last_hidden_state.view(2, T, -1) - alone[rows]).abs().max() <= 1e-10


def test_what_comes_later_changes_nothing():
    """Exactly as far as kernels round alike: 1e-12, for every position, tokens and concepts."""
    net, concepts = model("qwen3"), patterns()
    ids = torch.randint(3, 60, concepts.shape, generator=torch.Generator().manual_seed(2))
    before = parallel_forward(net, ids, concepts).last_hidden_state
    for t in range(1, T):
        other, chosen = ids.clone(), concepts.clone()
        other[:, t:] = 63 - other[:, t:]
        chosen[:, t:] = torch.where(chosen[:, t:] == V, 5, V)
        after = parallel_forward(net, other, chosen).last_hidden_state
        assert (after[:, :t] - before[:, :t]).abs().max() <= 1e-12
        assert (after[:, t:] - before[:, t:]).abs().max() > 1e-3


def test_without_concepts_the_middle_is_skipped_and_nothing_else():
    """All `<NULL>`: shallow and deep layers as a model of these alone, 1e-12."""
    net = model("llama", (1, 1, 1))
    ids = torch.randint(3, 60, (2, T), generator=torch.Generator().manual_seed(2))
    found = parallel_forward(net, ids, torch.full_like(ids, V)).last_hidden_state
    backbone = backbone_of(net)
    del backbone.layers[1]
    backbone.config.num_hidden_layers = 2
    assert (found - backbone(ids, use_cache=False).last_hidden_state).abs().max() <= 1e-12


def test_what_cannot_be_is_named():
    net = tiny.model("qwen3")
    with pytest.raises(ValueError, match="together 28, the model has 2 layers"):
        attach_concepts(net)
    with pytest.raises(ValueError, match="n_middle=0"):
        OnlineConceptConfig(1, 0, 1)
    with pytest.raises(ValueError, match="concepts already"):
        attach_concepts(model("qwen3"), OnlineConceptConfig(2, 2, 1))
