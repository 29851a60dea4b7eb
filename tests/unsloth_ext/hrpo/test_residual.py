"""The gate against its equations, in fp64, with finite differences; attaching, dropping, and who owns what."""

import pytest
import torch

from tests import tiny
from unsloth_ext import ThinkingConfig, attach_thinking, backbone_of, drop_thinking, has_thinking
from unsloth_ext.hrpo.adapter import THINKING_MODULES


def reference(backbone, e, s):
    """Equation by equation, nothing clever."""
    linear = lambda m, x: x @ m.weight.T + m.bias  # noqa: E731
    r = 1 / (1 + torch.exp(-linear(backbone.thinking_residual_gate_r, e)))
    i = 1 / (1 + torch.exp(-linear(backbone.thinking_residual_gate_i, e)))
    a = torch.exp(-8 * torch.log(1 + torch.exp(-backbone.thinking_residual_Lambda.Lambda)) * r)
    return a * e + torch.sqrt(1 - a**2 + 1e-8) * (i * s)


def double_model(family="qwen3"):
    net = attach_thinking(tiny.model(family, dtype=torch.float64)).double()
    tiny.loud_gates(backbone_of(net))
    return net


def test_fusion_is_its_equation_and_leaves_other_tokens_alone():
    backbone = backbone_of(double_model())
    e, s = torch.randn(2, 7, 32).double(), torch.randn(2, 4, 32).double()
    mask = torch.rand(2, 4) > 0.5
    out = backbone.fuse_thinking(e, mask, s)
    assert torch.equal(out[:, :3], e[:, :3])
    assert torch.equal(out[:, 3:][~mask], e[:, 3:][~mask])
    torch.testing.assert_close(out[:, 3:][mask], reference(backbone, e[:, 3:], s)[mask], rtol=1e-12, atol=1e-12)


def test_initial_a_is_uniform_between_the_bounds_at_r_1():
    torch.manual_seed(0)
    backbone = backbone_of(attach_thinking(tiny.model(), ThinkingConfig(residual_r_min=0.9, residual_r_max=0.99)))
    a = backbone.thinking_residual_Lambda(torch.ones(32)).exp()
    assert 0.9 <= a.min() < 0.915 and 0.975 < a.max() <= 0.99
    half = backbone.thinking_residual_Lambda(torch.full((32,), 0.5)).exp()
    torch.testing.assert_close(half, a.sqrt(), rtol=1e-5, atol=0)  # a = u^r


def test_the_projection_starts_at_a_thousandth_and_the_gates_at_their_own_scale():
    """Standard deviations to 5%: 0.001, and Xavier's sqrt(6 / 2d) / sqrt(3)."""
    torch.manual_seed(0)
    backbone = backbone_of(attach_thinking(tiny.model()))
    assert backbone.thinking_projection.weight.std().item() == pytest.approx(0.001, rel=0.05)
    for name in ("thinking_residual_gate_r", "thinking_residual_gate_i"):
        module = getattr(backbone, name)
        assert module.weight.std().item() == pytest.approx((1 / 32) ** 0.5, rel=0.05) and not module.bias.any()


def test_small_decay_keeps_its_digits():
    """1 - a^2 near a = 1: the plain formula loses it in fp32, expm1 does not."""
    backbone = backbone_of(attach_thinking(tiny.model()))
    with torch.no_grad():
        backbone.thinking_residual_Lambda.Lambda.fill_(20.0)
    from unsloth_ext.hrpo.residual import gate

    _, b, _ = gate(backbone, torch.zeros(1, 1, 32))
    log_a = -8 * torch.nn.functional.softplus(torch.tensor(-20.0).double()) * 0.5
    expected = torch.sqrt(-torch.expm1(2 * log_a) + 1e-8)
    torch.testing.assert_close(b.double(), expected.expand_as(b), rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", THINKING_MODULES)
def test_gradients_agree_with_finite_differences(name):
    """fp64, central differences of step 1e-6: relative error below 1e-6. GPT-2, because RMSNorms compute in fp32."""
    net = double_model("gpt2").eval()
    backbone = backbone_of(net)
    ids, mask = torch.randint(3, 40, (2, 9)), torch.tensor([[True, True, False, True], [False, True, True, True]])
    hidden = torch.randn(2, 4, 32).double()
    weight = torch.randn(2, 9, 64).double()

    def loss():
        out = net(
            input_ids=ids,
            thinking_mask=mask,
            recompute_thinking_projection=True,
            thinking_hidden_states_cache=hidden,
        )
        return (out.logits.log_softmax(-1) * weight).sum()

    parameter = next(getattr(backbone, name).parameters())
    (grad,) = torch.autograd.grad(loss(), parameter)
    assert grad.abs().max() > 0
    for index in torch.randint(parameter.numel(), (4,)).tolist():
        flat = parameter.data.view(-1)
        kept, step = flat[index].item(), 1e-6
        values = []
        for sign in (1, -1):
            flat[index] = kept + sign * step
            with torch.no_grad():
                values.append(loss().item())
        flat[index] = kept
        numeric = (values[0] - values[1]) / (2 * step)
        assert numeric == pytest.approx(grad.view(-1)[index].item(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_without_our_keywords_the_model_is_untouched(family):
    plain, thinking = tiny.model(family), attach_thinking(tiny.model(family))
    ids = torch.randint(3, 40, (2, 6))
    assert torch.equal(plain(input_ids=ids).logits, thinking(input_ids=ids).logits)


def test_attach_twice_is_an_error_and_drop_undoes_it():
    net = attach_thinking(tiny.model())
    with pytest.raises(ValueError, match="already"):
        attach_thinking(net)
    before = set(tiny.model().state_dict())
    assert set(drop_thinking(net).state_dict()) == before
    assert not has_thinking(net) and not hasattr(net.config, "thinking")


def test_shapes_that_do_not_fit_are_named():
    backbone = backbone_of(attach_thinking(tiny.model()))
    e = torch.zeros(2, 3, 32)
    with pytest.raises(ValueError, match=r"\(2, 4\)"):
        backbone.fuse_thinking(e, torch.ones(2, 4, dtype=torch.bool), torch.zeros(2, 4, 32))
    with pytest.raises(ValueError, match="either thinking_states or the hidden_states"):
        backbone.fuse_thinking(e, torch.ones(2, 3, dtype=torch.bool))


def test_a_model_without_modules_says_so():
    with pytest.raises(ValueError, match="attach_thinking"):
        attach_thinking(tiny.model())  # applies the patch to the class
        tiny.model()(input_ids=torch.ones(1, 2, dtype=torch.long), thinking_mask=torch.ones(1, 2, dtype=torch.bool))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"thinking_source": "x"}, "thinking_source"),
        ({"thinking_norm": "x"}, "thinking_norm"),
        ({"residual_r_min": 0.999, "residual_r_max": 0.99}, "residual_r_min"),
    ],
)
def test_config_errors_name_the_field(fields, message):
    with pytest.raises(ValueError, match=message):
        ThinkingConfig(**fields)
