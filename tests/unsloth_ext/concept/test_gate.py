"""The Gumbel gate: what it samples, and its gradient against the expectation written out."""

import torch

from unsloth_ext.concept.gate import gumbel_straight_through, likeliest
from unsloth_ext.residual import backbone_of

from .test_forward import V, model


def backbone():
    return backbone_of(model("qwen3"))


def test_samples_follow_the_heads_distribution():
    """20,000 draws of one state: frequencies within 0.02 of softmax(logits)."""
    net = backbone()
    state = torch.randn(1, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.5
    drawn = gumbel_straight_through(net, state.expand(20_000, -1), 1.0, torch.Generator().manual_seed(1)).ids
    frequency = torch.bincount(drawn, minlength=V + 1) / len(drawn)
    assert (frequency - net.concept_head(state)[0].softmax(-1)).abs().max() <= 0.02


def test_value_is_the_codeword_and_gradient_the_expectations():
    """1e-12 in fp64, for state, head and table; `<NULL>` has neither."""
    net = backbone()
    state = torch.randn(4, 9, 32, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        net.concept_head.bias[-1] += 4
    choice = gumbel_straight_through(net, state, 0.7, torch.Generator().manual_seed(1))
    concept = choice.ids != V
    assert 0 < concept.sum() < concept.numel()
    table = net.concept_embedding.weight
    assert choice.embeds[concept].equal(table[choice.ids[concept]])
    weights = torch.randn(4, 9, 32, dtype=torch.float64)
    wrt = [state, *net.concept_head.parameters(), table]
    found = torch.autograd.grad((choice.embeds * weights)[concept].sum(), wrt)
    uniform = torch.rand(4, 9, V + 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = ((net.concept_head(state) - (-uniform.log()).log()) / 0.7).softmax(-1)
    assert y.argmax(-1).equal(choice.ids)
    plain = torch.autograd.grad((((y[..., :V] @ table) * weights)[concept]).sum(), wrt[:-1], retain_graph=True)
    for ours, theirs in zip(found[:-1], plain):
        assert (ours - theirs).abs().max() <= 1e-12 * max(1, theirs.abs().max())
    hard = torch.autograd.grad((table[choice.ids[concept]] * weights[concept]).sum(), table)[0]
    soft = torch.autograd.grad((((y[..., :V] @ table) * weights)[concept]).sum(), table)[0]
    assert (found[-1] - hard - soft).abs().max() <= 1e-12 * max(1, soft.abs().max())
    assert found[0][~concept].abs().max() == 0  # the literal objective says nothing where there is no concept


def test_without_noise_it_is_the_likeliest():
    """A temperature near 0 changes no argmax; noise does, for some."""
    net, state = backbone(), torch.randn(200, 32, dtype=torch.float64) * 0.3
    ids = likeliest(net, state).ids
    sampled = gumbel_straight_through(net, state, 1e-3, torch.Generator().manual_seed(0)).ids
    assert ids.equal(net.concept_head(state).argmax(-1)) and 0 < (ids == sampled).float().mean() < 1
