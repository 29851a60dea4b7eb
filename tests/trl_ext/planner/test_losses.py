"""Each term against its formula, in loops."""

import math

import pytest
import torch

from tests.unsloth_ext.planner import setups as models
from trl_ext.planner.losses import (
    UsageAverage,
    commitment_loss,
    expected_use,
    hard_use,
    loss_eos,
    plan_predictions,
)
from unsloth_ext import plan_log_prob, plan_soft


def soft_plan(way=models.WAYS[0]):
    net, (ids, mask) = models.model(way=way), models.texts()
    return net, plan_soft(net, ids, mask, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("way", models.WAYS)
def test_terms_of_a_soft_plan(way):
    """1e-6 (cosines are taken in fp32)."""
    _, soft = soft_plan(way)
    for r in range(4):
        pairs = [(soft.soft[r, i, j], soft.hard[r, i, j]) for i in (0, 1) for j in range(4) if soft.ids[r, i, j] >= 0]
        apart = [1 - (a @ b / (a.norm() * b.norm())) for a, b in pairs]
        assert (commitment_loss(soft)[r] - (sum(apart) / len(apart) if apart else 0)).abs() <= 1e-6
        ends = [-soft.eos[r, i, q - 1].log() for i, q in ((0, 3), (1, 4)) if (soft.ids[r, i] >= 0).sum() == q]
        assert (loss_eos(soft, [3, 4])[r] - sum(ends) / 2).abs() <= 1e-6
    for i, size in enumerate((5, 4)):
        use = torch.zeros(size, dtype=torch.float64)
        for r in range(4):
            for j in range(soft.log_probs[i].shape[1]):
                if soft.ids[r, i, j] >= 0:
                    p = soft.log_probs[i][r, j].exp()
                    use += p[:-1] / p[:-1].sum()
        assert (expected_use(soft, i) - use).abs().max() <= 1e-6


def test_some_plans_are_full_and_some_are_not():
    _, soft = soft_plan()
    lost = loss_eos(soft, [3, 4])
    assert (lost > 0).any() and (lost == 0).any()


def test_gradients_go_where_they_should():
    """Commitment moves the expected codeword, not the chosen one; the last slot's <EOS> becomes likelier."""
    net, soft = soft_plan()
    leaves = soft.soft.detach().requires_grad_(), soft.hard.detach().requires_grad_()
    apart = type(soft)(**{**vars(soft), "soft": leaves[0], "hard": leaves[1]})
    commitment_loss(apart).sum().backward()
    assert leaves[0].grad.abs().max() > 0 and leaves[1].grad is None
    head = net.model.unified_head
    (slope,) = torch.autograd.grad(loss_eos(soft, [3, 4]).sum(), head.table)
    assert slope[head.vocabulary.outputs(0)].abs().max() > 0


@pytest.mark.parametrize("way", models.WAYS)
def test_predictions_of_a_given_plan(way):
    """1e-12 in fp64, gradients too; log-probabilities add up to the plan's."""
    net, (ids, mask), plans = models.model(way=way), models.texts(), models.plans()
    ours, log_probs, opens = plan_predictions(net, ids, mask, plans)
    theirs = plan_log_prob(net, ids, mask, plans)
    assert (ours - theirs).abs().max() <= 1e-12
    models.assert_same_gradients(net, ours.sum(), theirs.sum(), 1e-12)
    for i, (quota, size) in enumerate(((3, 5), (4, 4))):
        lengths = (plans[:, i] >= 0).sum(1)
        assert torch.equal(opens[i].sum(1), (lengths + 1).clamp(max=quota))
        assert log_probs[i].shape == (4, quota, size + 1) and (log_probs[i].exp().sum(-1) - 1).abs().max() <= 1e-12
    total = 0
    for i, (quota, size) in enumerate(((3, 5), (4, 4))):
        for r in range(4):
            for j in range(quota):
                if opens[i][r, j]:
                    total += log_probs[i][r, j, plans[r, i, j] if plans[r, i, j] >= 0 else size]
    assert abs(total - theirs.sum()) <= 1e-10
    assert [hard_use(plans, i, size).tolist() for i, size in ((0, 5), (1, 4))] == [[4, 1, 1, 1, 1], [1, 5, 1, 2]]


def test_the_average_of_use_is_a_moving_one_with_the_newest_steps_gradient():
    """1e-6: of a step as much as it has of the window, and of the past the rest."""
    average = UsageAverage([3, 2], 10.0)
    steps = [torch.tensor([4.0, 2.0, 0.0]), torch.tensor([1.0, 1.0, 10.0]), torch.tensor([0.0, 2.0, 1.0])]
    assert average.perplexity(0) == 0
    for use in steps[:2]:
        average.update([use, torch.zeros(2)])
    last = steps[2].clone().requires_grad_()
    shares = [use / use.sum() for use in steps]
    weights = [0.2 * 0.6 * 0.9, 0.4 * 0.9, 0.1]  # 6, 12 and 3 concepts of 30
    wanted = sum(w * s for w, s in zip(weights, shares)) / sum(weights)
    share = average.share(0, last)
    assert (share - wanted).abs().max() <= 1e-6
    loss = average.loss([last, torch.zeros(2)])
    assert abs(loss - (math.log(3) + (wanted * wanted.log()).sum()) / 2) <= 1e-6  # nothing is asked of the second type
    loss.backward()
    moved = steps[2].clone().requires_grad_()
    (((moved / moved.sum()) * (wanted.log() + 1)).sum() / 2).backward()
    assert (last.grad - moved.grad).abs().max() <= 1e-6
    average.update([steps[2], torch.zeros(2)])
    assert (average.share(0) - wanted).abs().max() <= 1e-6
    assert average.perplexity(0) == pytest.approx(math.exp(-(wanted * wanted.log()).sum()), rel=1e-5)
    assert average.perplexity(1) == 0


def test_a_step_of_enough_concepts_stands_for_itself():
    """1e-6."""
    average = UsageAverage([3], 4.0)
    average.update([torch.tensor([7.0, 3.0, 2.0])])
    average.update([torch.tensor([1.0, 2.0, 27.0])])
    assert (average.share(0) - torch.tensor([1.0, 2.0, 27.0]) / 30).abs().max() <= 1e-6
