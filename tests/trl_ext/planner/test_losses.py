"""Each term against its formula, in loops."""

import math

import pytest
import torch

from tests.unsloth_ext.planner import setups as models
from trl_ext.planner.losses import (
    UsageAverage,
    commitment_loss,
    expected_and_chosen,
    expected_use,
    hard_use,
    loss_eos,
    mean_entropy,
    plan_predictions,
    signal_nll,
)
from unsloth_ext import backbone_of, executor_prefix, plan_log_prob, plan_soft
from unsloth_ext.planner.vocabulary import DROPPED


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


def test_the_signal_is_every_word_from_plan_and_place():
    """1e-10 in fp64, gradients too: against one word at a time, nothing but placeholders before it."""
    net, (ids, mask), plans = models.model(), models.texts("right"), models.plans()
    scored = mask.bool()
    scored[0, 1] = False
    found = signal_nll(net, {"input_ids": ids, "attention_mask": mask}, plans, scored)
    total, placeholder = 0, backbone_of(net).unified_head.special(DROPPED)
    for r in range(4):
        prefix = executor_prefix(net, plans[r : r + 1])
        for t in range(int(mask[r].sum())):
            if scored[r, t]:
                length = torch.arange(backbone_of(net).planner_config.max_quota + 1, 99)[:t][None]
                hidden = backbone_of(net)(
                    inputs_embeds=torch.cat([prefix.embeds, placeholder.expand(1, t, -1)], dim=1),
                    attention_mask=torch.cat([prefix.mask, torch.ones(1, t).bool()], dim=1).long(),
                    position_ids=torch.cat([prefix.positions, length], dim=1),
                ).last_hidden_state[0, -1]
                total = total - net.lm_head(hidden).log_softmax(-1)[ids[r, t]]
    assert abs(found - total) <= 1e-10
    models.assert_same_gradients(net, found, total, 1e-10)


def test_mean_entropy_is_over_predictions_that_were_made():
    """1e-12."""
    net, (ids, mask), plans = models.model(), models.texts(), models.plans()
    _, log_probs, opens = plan_predictions(net, ids, mask, plans)
    each = [-(x[b, j].exp() * x[b, j]).sum() for x, o in zip(log_probs, opens) for b, j in o.nonzero().tolist()]
    assert abs(mean_entropy(log_probs, opens) - sum(each) / len(each)) <= 1e-12


def test_expected_codewords_are_those_of_samples():
    """1e-12: of each type at the temperature, against a sum over codewords; chosen ones by their rows."""
    net, (ids, mask), plans = models.model(), models.texts(), models.plans()
    log_probs, head = plan_predictions(net, ids, mask, plans)[1], backbone_of(net).unified_head
    soft, hard = expected_and_chosen(net, log_probs, plans, 1.7)
    for b, i, j in (plans >= 0).nonzero().tolist():
        weights = (log_probs[i][b, j, :-1] / 1.7).exp()
        wanted = sum(w * row for w, row in zip(weights / weights.sum(), head.concepts(i)))
        assert (soft[b, i, j] - wanted).abs().max() <= 1e-12
        assert torch.equal(hard[b, i, j], head.concepts(i)[plans[b, i, j]])
