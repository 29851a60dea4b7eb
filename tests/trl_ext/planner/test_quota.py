"""Dual ascent, under Adam, holds expected lengths at their targets, from above and from below."""

import pytest
import torch

from tests.marks import slow
from trl_ext.planner.quota import PlannerQuotaController


def lengths(logits):
    """E[length] (n,) of plans whose p(<EOS>) at each slot has these logits (n, Q)."""
    return (1 - logits.sigmoid()).cumprod(-1).sum(-1)


def run(targets, start, rate, steps=1500, pull=0.0):
    """Final lengths under the controller and a task that would have plans longer (pull > 0) or shorter."""
    controller = PlannerQuotaController(targets, [8] * len(targets), rate)
    logits = torch.full((len(targets), 8), start, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.03)
    for _ in range(steps):
        found = lengths(logits)
        loss = controller.loss(found) - pull * found.sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        controller.update(found.detach())
    return lengths(logits).detach(), controller


@pytest.mark.parametrize("start", [-4.0, 4.0])
@pytest.mark.parametrize("pull", [slow(0.0), 0.1, slow(-0.1)])
def test_targets_are_reached_from_both_sides_against_a_task_that_pulls(start, pull):
    """0.1 concepts; without dual ascent (a rate of next to nothing) the pull wins by more."""
    targets = [2.0, 6.0]
    found, controller = run(targets, start, 0.1, pull=pull)
    assert (found - torch.tensor(targets)).abs().max() <= 0.1
    if pull:
        loose, _ = run(targets, start, 1e-9, pull=pull)
        assert (loose - torch.tensor(targets)).abs().max() > 0.3
        assert (controller.multipliers.sign() == (1 if pull > 0 else -1)).all()


def test_formula():
    """1e-12: c = (E - target) / quota, lambda += rate c, loss = lambda c + 5 c^2."""
    controller = PlannerQuotaController([2.0, 3.0], [4, 6], 0.5)
    now = torch.tensor([3.0, 1.0], dtype=torch.float64)
    assert abs(controller.loss(now) - 5 * ((1 / 4) ** 2 + (2 / 6) ** 2)) <= 1e-12
    for mean in ([4.0, 0.0], [3.0, 3.0]):
        controller.update(torch.tensor(mean))
    multipliers = torch.tensor([0.5 * (0.5 + 0.25), 0.5 * -0.5], dtype=torch.float64)
    assert (controller.multipliers - multipliers).abs().max() <= 1e-12
    c = torch.tensor([1 / 4, -2 / 6], dtype=torch.float64)
    assert abs(controller.loss(now) - (multipliers * c + 5 * c**2).sum()) <= 1e-12
    assert set(controller.state_dict()) == {"multipliers"}
