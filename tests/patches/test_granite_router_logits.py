"""GraniteMoeShared's auxiliary loss with the patch, what there is without it, and how far its gradient reaches."""

import functools

import pytest
import torch
from torch.nn import functional as F
from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedModel

import patches
from patches import granite_router_logits
from tests import moe


NAME = "granite_router_logits"


@pytest.fixture
def unpatched():
    applied = patches.status()[NAME].applied
    patches.revert(NAME)
    yield
    if applied:
        patches.apply(NAME)


NEEDED = pytest.mark.skipif(not granite_router_logits.needed(), reason="since transformers 5.24 it is not needed")


@pytest.mark.skipif(granite_router_logits.needed(), reason="before transformers 5.24 it is needed")
def test_it_is_not_applied_where_transformers_records_them(unpatched):
    inputs, net = moe.batch(), moe.model("minimind2-moe")
    assert not patches.status()[NAME].applied
    assert len(net(**inputs, output_router_logits=True).router_logits) == 2


@NEEDED
def test_without_it_there_is_no_auxiliary_loss(unpatched):
    """A canary: where it fails, transformers records them by itself."""
    inputs = moe.batch()
    net = moe.model("minimind2-moe")
    patches.revert(NAME)  # the preset applied it
    assert net(**inputs).router_logits is None
    assert net(**inputs, output_router_logits=True).aux_loss == 0
    with pytest.raises(AttributeError, match="'int' object has no attribute 'to'"):
        net(**inputs, labels=inputs["input_ids"], output_router_logits=True)


@NEEDED
def test_it_changes_nothing_else_and_reverts(unpatched):
    """Logits, loss and, without names, the whole output: bit for bit."""
    before = GraniteMoeSharedModel.forward
    net, inputs = moe.model("minimind2-moe"), moe.batch()
    patches.revert(NAME)
    calls = ({}, {"labels": inputs["input_ids"]}, {"output_hidden_states": True})
    with torch.no_grad():
        plain, tuples = [net(**inputs, **x) for x in calls], net.model(**inputs, return_dict=False)
        with patches.applied(NAME):
            assert GraniteMoeSharedModel.forward is not before and patches.status()[NAME].live
            found, again = [net(**inputs, **x) for x in calls], net.model(**inputs, return_dict=False)
            assert not any(module._forward_hooks for module in net.modules() if "TopKRouter" in type(module).__name__)
    assert GraniteMoeSharedModel.forward is before and net(**inputs).router_logits is None
    for a, b in zip(plain, found, strict=True):
        assert torch.equal(a.logits, b.logits) and (a.loss is None or torch.equal(a.loss, b.loss))
        assert len(b.router_logits) == 2 and a.router_logits is None
    assert all(torch.equal(a, b) for a, b in zip(plain[2].hidden_states, found[2].hidden_states, strict=True))
    assert len(tuples) == len(again) and torch.equal(tuples[0], again[0])


def test_they_are_each_layers_router_times_what_it_reads():
    """1e-6: the normalised input of the feed-forward times the router's weight, layer by layer."""
    net, inputs = moe.model("minimind2-moe").eval(), moe.batch()
    read = []
    for layer in net.model.layers:
        layer.post_attention_layernorm.register_forward_hook(lambda _, __, out: read.append(out.flatten(0, 1)))
    found = net(**inputs, output_router_logits=True).router_logits
    for logits, x, weight in zip(found, read, moe.routers(net).values(), strict=True):
        assert (logits - x @ weight.T).abs().max() <= 1e-6 * logits.abs().max() and logits.dtype == torch.float32


@pytest.mark.parametrize("kind", moe.KINDS)
def test_the_loss_is_over_all_layers_without_padding(kind):
    """1e-6 relative; with padding counted it would be another."""
    net, inputs = moe.model(kind), moe.batch()
    out = net(**inputs, output_router_logits=True)
    top_k, mask = net.config.num_experts_per_tok, inputs["attention_mask"]
    assert out.aux_loss.item() == pytest.approx(moe.auxiliary(out.router_logits, top_k, mask).item(), rel=1e-6)
    padded = moe.auxiliary(out.router_logits, top_k, torch.ones_like(mask)).item()
    assert abs(padded - out.aux_loss.item()) > 1e-3 * padded


@pytest.mark.parametrize("kind", moe.KINDS)
def test_the_models_loss_has_it_times_the_coefficient(kind):
    """1e-5."""
    inputs = moe.batch()
    net = moe.model(kind, router_aux_loss_coef=0.7)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    out, alone = (net(**inputs, labels=labels, output_router_logits=on) for on in (True, False))
    assert (out.loss - alone.loss).item() == pytest.approx(0.7 * out.aux_loss.item(), abs=1e-5)


@pytest.mark.parametrize("kind", moe.KINDS)
def test_its_gradient_is_a_finite_difference(kind):
    """In float64, at the weight of each router with the largest gradient: 5e-4 (transformers sums in fp32)."""
    net, inputs = moe.model(kind).double(), moe.batch()
    net.set_experts_implementation("eager")  # the grouped kernels have no float64

    def loss():
        out = net(**inputs, output_router_logits=True)
        chosen = [x.topk(net.config.num_experts_per_tok).indices.sort().values for x in out.router_logits]
        return out.aux_loss, torch.stack(chosen)

    value, chosen = loss()
    value.backward()
    routers = moe.routers(net)
    assert len(routers) == 2
    for weight in routers.values():
        at, eps = weight.grad.abs().argmax(), 1e-3
        assert weight.grad.abs().max() > 1e-2
        ends = []
        with torch.no_grad():
            for step in (eps, -2 * eps):
                weight.view(-1)[at] += step
                end, same = loss()
                assert torch.equal(same, chosen)  # where the choice moves, f jumps
                ends.append(end.item())
            weight.view(-1)[at] += eps
        assert (ends[0] - ends[1]) / (2 * eps) == pytest.approx(weight.grad.view(-1)[at].item(), abs=5e-4)


@pytest.mark.parametrize("kind", moe.KINDS)
def test_checkpointed_activations_give_the_routers_the_same_gradient(kind):
    """Bit for bit, as transformers checkpoints unless told otherwise; the re-entrant kind leaves the loss without one."""
    inputs = moe.batch()
    net = moe.model(kind, router_aux_loss_coef=0.7).train()
    aux, grads = [], []
    for enable in (
        lambda: None,
        net.gradient_checkpointing_enable,
        functools.partial(net.gradient_checkpointing_enable, {"use_reentrant": True}),
    ):
        enable()
        net.zero_grad()
        out = net(**inputs, labels=inputs["input_ids"], output_router_logits=True, use_cache=False)
        out.loss.backward()
        aux.append(out.aux_loss)
        grads.append({n: p.grad.clone() for n, p in net.named_parameters()})
    assert net.is_gradient_checkpointing
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])
    assert aux[1].requires_grad and not aux[2].requires_grad
    assert not any(torch.equal(grads[0][n], grads[2][n]) for n in moe.routers(net))


def test_the_tutorials_ways_fail_or_have_no_gradient():
    """Shares of a one-hot mask as it comes are an error; floats have no gradient, nor has a loss kept as a number."""
    logits = torch.randn(20, 4, requires_grad=True)
    chosen = F.one_hot(logits.softmax(-1).topk(2).indices, 4).sum(1)
    with pytest.raises(RuntimeError, match="could not infer output dtype"):
        chosen.mean(0)
    f = chosen.float().mean(0)
    with pytest.raises(RuntimeError, match="does not require grad"):
        (4 * f * f).sum().backward()
    grads = []
    for aux in (4 * (f * logits.softmax(-1).mean(0)).sum(), (4 * (f * logits.softmax(-1).mean(0)).sum()).item(), 0.0):
        logits.grad = None
        (logits.square().mean() + aux).backward()  # a loss that has a gradient of its own: no error tells
        grads.append(logits.grad)
    assert torch.equal(grads[1], grads[2]) and (grads[0] - grads[2]).abs().max() > 1e-3
