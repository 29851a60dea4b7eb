"""Advantages, whitening and value loss against loops over rows and tokens."""

import pytest
import torch

from trl_ext.ppo.advantages import clipped_value_loss, generalized_advantages, moments

from . import reference


MASK = torch.tensor(
    [
        [1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0],  # padding
        [1, 0, 0, 1, 1, 0],  # a tool between
        [1, 1, 0, 0, 0, 0],  # the tool's answer, or padding, last
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
    ]
)


def case(seed=0):
    torch.manual_seed(seed)
    return torch.randn(6, dtype=torch.float64), torch.randn(6, 6, dtype=torch.float64)


@pytest.mark.parametrize("gamma,lam", [(1.0, 0.95), (0.9, 0.5), (1.0, 0.0), (1.0, 1.0), (0.0, 0.95)])
def test_advantages_are_the_sums_of_their_definition(gamma, lam):
    """Float64, to 1e-12."""
    rewards, values = case()
    found = generalized_advantages(rewards, values, MASK, gamma, lam)
    for b, row in enumerate(MASK):
        wanted = reference.gae(rewards[b].item(), values[b].tolist(), row.tolist(), gamma, lam)
        wanted = torch.tensor([0.0 if a is None else a for a in wanted], dtype=torch.float64)
        assert torch.allclose(found[b], wanted, rtol=0, atol=1e-12)


def test_what_the_value_is_off_the_mask_changes_no_bit():
    rewards, values = case()
    found = generalized_advantages(rewards, values, MASK, 1.0, 0.95)
    for other in (1e9, float("nan")):
        assert torch.equal(
            found, generalized_advantages(rewards, values.masked_fill(MASK == 0, other), MASK, 1.0, 0.95)
        )


def test_longer_padding_changes_no_bit():
    rewards, values = case()
    found = generalized_advantages(rewards, values, MASK, 1.0, 0.95)
    wide = [torch.cat([x, torch.zeros(6, 3, dtype=x.dtype)], dim=1) for x in (values, MASK)]
    assert torch.equal(found, generalized_advantages(rewards, *wide, 1.0, 0.95)[:, :6])


def test_lambda_one_is_reward_minus_value():
    """gamma = lambda = 1: A_t = r - V_t, so returns are the reward. To 1e-12."""
    rewards, values = case()
    returns = (generalized_advantages(rewards, values, MASK, 1.0, 1.0) + values)[MASK == 1]
    assert torch.allclose(returns, rewards[:, None].expand(6, 6)[MASK == 1], rtol=0, atol=1e-12)


def test_moments_are_those_of_what_is_on_the_mask():
    """To 1e-12; and a second process with the same numbers changes neither."""
    values = case()[1]
    mean, variance = moments(values, MASK, lambda x: x)
    wanted = reference.mean_and_variance(values[MASK == 1].tolist())
    assert (mean.item(), variance.item()) == pytest.approx(wanted, abs=1e-12)
    twice = moments(values, MASK, lambda x: 2 * x)
    assert (twice[0].item(), twice[1].item()) == pytest.approx(wanted, abs=1e-12)
    assert [x.item() for x in moments(values, torch.zeros_like(MASK), lambda x: x)] == [0, 0]


def test_value_loss_and_its_gradient():
    """Each branch, to 1e-12: inside the range; outside it and further; outside it and nearer to the return."""
    old, target = 0.5, 1.0
    for value, wanted, slope in [(0.6, 0.5 * 0.16, -0.4), (0.1, 0.5 * 0.81, -0.9), (0.9, 0.5 * 0.09, 0.0)]:
        v = torch.tensor(value, dtype=torch.float64, requires_grad=True)
        loss = clipped_value_loss(v, torch.tensor(old).double(), torch.tensor(target).double(), 0.2)
        loss.backward()
        assert loss.item() == pytest.approx(wanted, abs=1e-12) and v.grad.item() == pytest.approx(slope, abs=1e-12)
