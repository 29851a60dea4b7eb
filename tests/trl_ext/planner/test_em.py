"""The E-step against every plan there is; what is kept of it, and when the next one comes."""

import math

import pytest
import torch

from tests.unsloth_ext.planner import setups as models
from trl_ext.planner import em
from trl_ext.planner.em import EStep, EStepSchedule, PlanCache, e_step, number_of_plans, score_plans
from unsloth_ext import backbone_of, executor_prefix, plan, plan_log_prob, text_log_prob


SIZES = ((2, 2), (3, 1))  # 7 * 4 plans


def given(way=models.WAYS[0], dtype=torch.float64):
    """A model, a batch of 4 rows, and every plan."""
    net = models.model(way=way, sizes=SIZES, dtype=dtype)
    (u, u_mask), (ids, mask) = models.texts(), models.texts(seed=5)
    labels = torch.nn.functional.pad(ids.masked_fill(mask == 0, -100), (1, 0), value=-100)
    batch = {
        "plan_input_ids": u,
        "plan_attention_mask": u_mask,
        "input_ids": ids,
        "attention_mask": mask,
        "labels": labels,
    }
    return net, batch, models.every_plan(net)


@torch.no_grad()
def plain_scores(net, batch, plans):
    """(B, N): one plan for all rows at a time."""
    found = []
    for p in plans:
        rows = p.expand(4, -1, -1)
        text = text_log_prob(net, executor_prefix(net, rows), batch["input_ids"], batch["attention_mask"])
        found.append(text + plan_log_prob(net, batch["plan_input_ids"], batch["plan_attention_mask"], rows))
    return torch.stack(found, dim=1)


NOBODY = torch.zeros(4, dtype=torch.bool)


@pytest.mark.parametrize("way", models.WAYS)
def test_the_best_of_all_plans_is_found(way):
    """1e-10 in fp64: beams that hold every plan, against one plan after another."""
    net, batch, every = given(way)
    assert number_of_plans(backbone_of(net).planner_config) == len(every) == 28
    wanted = plain_scores(net, batch, every)
    found = e_step(net.train(), batch, torch.full((4, 2, 2), -1), NOBODY, samples=0, beams=28)
    assert net.training
    assert torch.equal(found.plans, every[wanted.argmax(1)]) and len({str(p) for p in found.plans.tolist()}) > 1
    assert (found.best - wanted.amax(1)).abs().max() <= 1e-10
    assert found.scores.shape == (4, 29) and (found.scores[:, 0] == -torch.inf).all()


def test_scores_are_the_same_in_few_passes_and_in_many(monkeypatch):
    """1e-10; tokens without a label do not count."""
    net, batch, every = given()
    plans = every.expand(4, -1, -1, -1)
    wanted = score_plans(net, batch, plans)
    assert (wanted - plain_scores(net, batch, every)).abs().max() <= 1e-10
    monkeypatch.setattr(em, "TOKENS_PER_PASS", 1)
    assert (score_plans(net, batch, plans) - wanted).abs().max() <= 1e-10
    batch["labels"][:, 1] = -100
    without = score_plans(net, batch, plans) - wanted
    first = {**batch, "attention_mask": batch["attention_mask"].clone()}
    first["attention_mask"][:, 1:] = 0
    nll = text_log_prob(
        net, executor_prefix(net, every[:1].expand(4, -1, -1)), first["input_ids"], first["attention_mask"]
    )
    assert (without[:, 0] + nll).abs().max() <= 1e-10


def test_the_old_plan_stays_where_it_is_best_and_goes_where_it_is_not():
    net, batch, every = given()
    scores = plain_scores(net, batch, every)
    best, worst = every[scores.argmax(1)], every[scores.argmin(1)]
    old = torch.where(torch.tensor([True, False, True, False])[:, None, None], best, worst)
    found = e_step(net, batch, old, ~NOBODY, samples=3, beams=0, generator=torch.Generator().manual_seed(0))
    assert found.scores.shape == (4, 4) and torch.equal(found.plans[[0, 2]], best[[0, 2]])
    assert not torch.equal(found.plans[1], worst[1]) and (found.best >= found.scores[:, 0]).all()
    unknown = e_step(net, batch, best, NOBODY, samples=1, beams=1, generator=torch.Generator().manual_seed(0))
    greedy = plan(net, batch["plan_input_ids"], batch["plan_attention_mask"])
    assert torch.equal(unknown.candidates[:, 2], greedy) and torch.equal(unknown.candidates[:, 0], best)
    chosen = unknown.candidates[torch.arange(4), unknown.scores[:, 1:].argmax(1) + 1]
    assert torch.equal(unknown.plans, chosen)  # what is there unknown is no candidate


def test_sums_of_an_e_step():
    """1e-6: staleness and flips of rows that had a plan, margins between different plans."""
    a, b, c = ([[k, -1]] for k in range(3))
    candidates = torch.tensor([[a, b, a], [b, b, b], [a, b, c], [c, a, b]])
    scores = torch.tensor([[-2.0, -1.0, -2.0], [-3.0, -3.0, -3.0], [-torch.inf, -5.0, -7.0], [-1.0, -4.0, -9.0]])
    known = torch.tensor([True, True, False, True])
    plans = torch.tensor([b, b, b, c])
    gap, n_gap, flips, n_flips, margin, n_margin = (
        EStep(plans, candidates[:, 0], known, scores, candidates).sums().tolist()
    )
    assert (gap, n_gap) == pytest.approx((1.0, 3)) and (flips, n_flips) == pytest.approx((1.0, 3))
    assert (margin, n_margin) == pytest.approx((1.0 + 2.0 + 3.0, 3))  # the second row has but one plan
    nobody = EStep(plans, candidates[:, 0], ~known & False, scores, candidates)
    assert nobody.sums().isfinite().all() and nobody.sums()[1] == 0


def test_an_unknown_old_plan_does_not_hide_its_like():
    a, b = [[0, -1]], [[1, -1]]
    candidates, scores = torch.tensor([[a, a, b]]), torch.tensor([[-torch.inf, -1.0, -3.0]])
    found = EStep(torch.tensor([a]), torch.tensor([a]), torch.tensor([False]), scores, candidates)
    assert found.sums()[4:].tolist() == pytest.approx([2.0, 1])


def test_the_cache_keeps_plans_by_sample():
    cache = PlanCache(6, 2, 3)
    ids, plans = torch.tensor([4, 1, -1]), torch.randint(0, 9, (3, 2, 3))
    assert not cache.get(ids[:2])[1].any()
    cache.put(ids, plans)
    found, known = cache.get(torch.tensor([1, 4, 5]))
    assert torch.equal(found[:2], plans[[1, 0]]) and known.tolist() == [True, True, False]
    assert found.dtype == torch.long and (found[2] == -1).all()
    other = PlanCache(6, 2, 3)
    other.load_state_dict(cache.state_dict())
    assert torch.equal(other.plans, cache.plans) and other.known.sum() == 2


def test_every_m_steps():
    schedule = EStepSchedule(adaptive=False, threshold=1.0, most=64)
    done = []
    for step in range(10):
        if schedule.due(step, 4):
            done.append(step)
            schedule.done(step, 4, staleness=9.0)
    assert done == [0, 4, 8] and schedule.interval(2) == 2  # which a callback may set anew


def test_the_interval_follows_staleness():
    """Halves above the threshold, doubles below a quarter of it, and stays between 1 and the most."""
    schedule = EStepSchedule(adaptive=True, threshold=1.0, most=16)
    seen = []
    for staleness in (None, 2.0, 0.3, 2.0, 2.0, 2.0, 0.2, 0.2, 0.2, 0.2, 0.2, 0.2):
        schedule.done(0, 4, staleness)
        seen.append(schedule.interval(4))
    assert seen == [4, 2, 2, 1, 1, 1, 2, 4, 8, 16, 16, 16]
    assert EStepSchedule(True, 1.0, 16).interval(100) == 100  # as it was asked for
    assert math.isclose(schedule.scale, 4.0)


def test_a_forced_row_takes_a_sample_that_is_not_its_old_plan(monkeypatch):
    """Rows 0 and 1 are forced; samples are the old plans again, but for row 1. No row's best of all is a new one."""
    net, batch, every = given()
    scores = plain_scores(net, batch, every)
    order = scores.argsort(dim=1, descending=True)
    old = every[order[:, 0]]
    drawn = torch.stack([old, old], dim=1)
    drawn[1] = every[order[1, [2, 1]]]
    monkeypatch.setattr(em, "plan", lambda *_, **__: drawn.flatten(0, 1).clone())
    forced = torch.tensor([True, True, False, False])
    found = e_step(
        net, batch, old, ~NOBODY, samples=2, beams=0, forced=forced, generator=torch.Generator().manual_seed(1)
    )
    assert not torch.equal(found.plans[0], old[0]) and torch.equal(found.plans[0] >= 0, old[0] >= 0)
    assert torch.equal(found.plans[1], every[order[1, 1]]) and torch.equal(found.plans[2:], old[2:])
    plain = e_step(net, batch, old, ~NOBODY, samples=2, beams=0)
    assert torch.equal(plain.plans, old)
    new = e_step(net, batch, old, NOBODY, samples=2, beams=0, forced=forced)  # no old plan: every sample is one
    assert torch.equal(new.plans[[0, 2, 3]], old[[0, 2, 3]]) and torch.equal(new.plans[1], every[order[1, 1]])


def test_beams_take_no_samples_away():
    net, batch, _ = given()
    for beams in (0, 1, 5):
        found = e_step(net, batch, torch.full((4, 2, 2), -1), NOBODY, samples=3, beams=beams, diversity=1.0)
        assert found.candidates.shape[1] == 1 + 3 + beams
