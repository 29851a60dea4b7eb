"""The gate in training: what it samples, and its gradients against expectations written out."""

import pytest
import torch

from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.concept.gate import decide, next_entropy
from unsloth_ext.concept.packing import Texts
from unsloth_ext.concept.segmenters import Memory

from .test_forward import V, model, states


def backbone(**settings):
    return backbone_of(model("qwen3", **settings)).train()


def choose(net, state, seed=None):
    if seed is not None:
        torch.manual_seed(seed)
    texts = Texts(torch.ones(state.shape[:2], dtype=torch.bool))
    return decide(net, state, texts, Memory.empty(len(state), state.device))[0]


def random_state(*shape):
    return torch.randn(*shape, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_samples_follow_the_heads_distribution():
    """20,000 draws of one state: frequencies within 0.02 of softmax(logits)."""
    net, state = backbone(), random_state(1, 1) * 0.5
    choice = choose(net, state.expand(20, 1000, -1), seed=1)
    ids = torch.where(choice.concept, choice.ids[..., 0], V)
    frequency = torch.bincount(ids.flatten(), minlength=V + 1) / ids.numel()
    wanted = net.concept_head(state)[0, 0].softmax(-1)
    assert (frequency - wanted).abs().max() <= 0.02
    assert (choice.probability - (1 - wanted[-1])).abs().max() <= 1e-12


def test_the_factorised_gate_samples_which_and_not_whether():
    """Frequencies given a concept within 0.02 of the softmax over concepts, of each codebook."""
    net, state = backbone(gate="factorised", num_codebooks=2), random_state(1, 1) * 0.3
    choice = choose(net, state.expand(20, 1000, -1), seed=1)
    logits = net.concept_head(state)[0, 0]
    p = (logits[:V].logsumexp(-1) - logits[-1]).sigmoid()
    assert p > 0.5 and choice.concept.all() and (choice.probability - p).abs().max() <= 1e-12
    for book, codes in enumerate(logits[:-1].view(2, V)):
        frequency = torch.bincount(choice.ids[..., book].flatten(), minlength=V) / 20_000
        assert (frequency - codes.softmax(-1)).abs().max() <= 0.02


def test_value_is_the_codeword_and_gradient_the_expectations():
    """Literal: 1e-12 in fp64, for state, head and table; `<NULL>` has neither."""
    net = backbone()
    net.concept_gate.temperature = 0.7
    state = random_state(4, 9).requires_grad_()
    with torch.no_grad():
        net.concept_head.bias[-1] += 4
    choice = choose(net, state, seed=1)
    concept = choice.concept
    assert 0 < concept.sum() < concept.numel() and choice.weight is None
    table = net.concept_embedding.weight
    assert choice.embeds[concept].equal(table[choice.ids[concept][:, 0]])
    assert choice.embeds[~concept].abs().max() == 0
    weights = random_state(4, 9) + 1
    wrt = [state, net.concept_head.weight, net.concept_head.bias, table]
    found = torch.autograd.grad((choice.embeds * weights).sum(), wrt)
    torch.manual_seed(1)
    exponential = torch.empty(4, 9, V + 1, dtype=torch.float64).exponential_()
    y = ((net.concept_head(state) - exponential.log()) / 0.7).softmax(-1)
    assert y.argmax(-1).equal(torch.where(concept, choice.ids[..., 0], V))
    soft = ((y[..., :V] @ table) * weights)[concept].sum()
    hard = (table[choice.ids[concept][:, 0]] * weights[concept]).sum()
    plain = torch.autograd.grad(soft + hard - hard.detach(), wrt)
    for ours, theirs in zip(found, plain):
        assert (ours - theirs).abs().max() <= 1e-12 * max(1, theirs.abs().max())
    assert found[0][~concept].abs().max() == 0  # the literal objective says nothing where there is no concept


@pytest.mark.parametrize("segmenter", ["null", "threshold", "autoregressive"])
def test_the_factorised_gates_gradient_reaches_both_sides(segmenter):
    """The weight is 1 or 0, its gradient that of p = sigmoid(LSE - l_NULL + l_length), 1e-12; at `<NULL>` the embedding is
    the likeliest concept's."""
    more = {"max_tail": 5} if segmenter == "autoregressive" else {}
    net = backbone(gate="factorised", segmenter=segmenter, **more)
    state = random_state(4, 9).requires_grad_()
    with torch.no_grad():
        net.concept_head.bias[-1] += 4
        if more:
            net.concept_head.length_logits.copy_(torch.linspace(-1, 1, 5))
    choice = choose(net, state, seed=1)
    concept = choice.concept
    assert 0 < concept.sum() < concept.numel()
    assert choice.weight.equal(concept.double())
    logits = net.concept_head(state)
    own = logits[..., :V].logsumexp(-1) - logits[..., -1]
    if more:
        length, rows = [], concept.tolist()
        for row in rows:
            since = 0
            for made in row:
                since += 1
                length.append(since - 1)
                since = 0 if made else since
        own = own + net.concept_head.length_logits[torch.tensor(length).view(4, 9)]
    assert (choice.probability - own.sigmoid()).abs().max() <= 1e-12
    wrt = [state, *net.concept_head.parameters()]
    weights = random_state(4, 9)[..., 0]
    found = torch.autograd.grad((choice.weight * weights).sum(), wrt)
    plain = torch.autograd.grad((own.sigmoid() * weights).sum(), wrt)
    for ours, theirs in zip(found, plain):
        assert theirs.abs().max() > 0 and (ours - theirs).abs().max() <= 1e-12
    likeliest = logits[..., :V].argmax(-1)[~concept]
    assert choice.embeds[~concept].equal(net.concept_embedding.weight[likeliest])


def test_the_slot_is_blended_with_the_weights_gradient():
    """w c + (1 - w) h through the whole model: the loss has a gradient by every weight, whether there is a concept or not,
    and the NULL bias, which moves p alone, has what p' = p (1 - p) makes of these, 1e-9."""
    net = model("qwen3", gate="factorised")
    backbone = backbone_of(net).train()
    ids = torch.randint(3, 60, (2, 8), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = backbone(ids).choice.probability.logit()
        backbone.concept_head.bias[-1] += logits.median()
    torch.manual_seed(0)
    out = backbone(ids)
    assert 0 < out.choice.concept.sum() < 16
    slots = torch.autograd.grad(out.last_hidden_state.square().sum(), [out.choice.weight, backbone.concept_head.bias])
    p = out.choice.probability.detach()
    assert (slots[0].abs() > 0).all()  # both sides
    assert ((slots[0] * p * (1 - p)).sum() + slots[1][-1]).abs() <= 1e-9 * slots[1][-1].abs()


@pytest.mark.parametrize("settings", [{}, {"num_codebooks": 2}, {"boundary_keeps_token": True}])
@pytest.mark.parametrize("gate", ["literal", "factorised"])
def test_only_the_gradient_differs_in_training(gate, settings):
    """Values, 1e-10 in fp64, are those of the concepts that were drawn, had they been given."""
    net = model("qwen3", gate=gate, **settings)
    ids = torch.randint(3, 60, (4, 11), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        net.base_model.concept_head.bias[-1] += 2
    out = backbone_of(net).train()(ids)
    drawn = torch.where(out.choice.concept[..., None], out.choice.ids, V)
    assert 0 < out.choice.concept.sum() < ids.numel()
    assert (out.last_hidden_state - states(net.eval(), ids, drawn)).abs().max() <= 1e-10


def test_without_noise_it_is_the_likeliest():
    """In evaluation the largest logit; in training another, for some."""
    net, state = backbone(), random_state(4, 50) * 0.3
    largest = net.concept_head(state).argmax(-1)
    ids = [torch.where(c.concept, c.ids[..., 0], V) for c in (choose(net.eval(), state), choose(net.train(), state))]
    assert ids[0].equal(largest) and 0 < (ids[1] == largest).float().mean() < 1


def test_entropy_is_the_lm_heads():
    """1e-10 against the definition, in pieces and not."""
    net = model("qwen3", segmenter="entropy")
    state = random_state(2, 700)
    logs = net.lm_head(backbone_of(net).norm(state)).log_softmax(-1)
    found = next_entropy(backbone_of(net), state)
    assert (found + (logs.exp() * logs).sum(-1)).abs().max() <= 1e-10
    choice = choose(backbone_of(net).eval(), state)
    assert choice.concept.equal(found > net.base_model.concept_head(state)[..., -1])
