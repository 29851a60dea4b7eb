"""The tracker against a literal loop over visits in Python's floats."""

import math
import random

import pytest
import torch

from trl_ext import AutoAdaptiveValueTracker


def literal(visits, prompts, rho_mode="kl", rho_const=0.9, d_half=0.06, low=0.875, high=0.96, first=0.5):
    """arXiv 2509.13232, prompt by prompt. `visits`: (prompt, reward, D or None). The values before, rho, a, b."""
    n0 = 1 / (1 - low)
    a, b = [n0 * first] * prompts, [n0 * (1 - first)] * prompts
    values, rhos = [], []
    for prompt, reward, divergence in visits:
        values.append(a[prompt] / (a[prompt] + b[prompt]))
        rho = rho_const
        if rho_mode == "kl" and divergence is not None:
            rho = min(max(2 ** (-divergence / d_half), low), high)
        rhos.append(rho)
        a[prompt] = rho * a[prompt] + reward
        b[prompt] = rho * b[prompt] + 1 - reward
    return values, rhos, a, b


@pytest.mark.parametrize("mode", ["kl", "constant"])
@pytest.mark.parametrize("first", [0.5, 0.0, 0.9])
def test_many_steps_are_those_of_the_literal_loop(mode, first):
    """400 rollouts of 6 of 20 prompts; to 1e-12."""
    rng = random.Random(0)
    tracker = AutoAdaptiveValueTracker(rho_mode=mode, prompts=20, initial_value=first)
    visits, values, rhos = [], [], []
    for _ in range(400):
        rows = rng.sample(range(20), 6)
        rewards = [rng.choice([0.0, 1.0, rng.random()]) for _ in rows]
        divergence = [rng.choice([None, rng.expovariate(30)]) for _ in rows]
        visits += zip(rows, rewards, divergence, strict=True)
        at = torch.tensor(rows)
        values += tracker.value(at).tolist()
        given = torch.tensor([math.nan if d is None else d for d in divergence], dtype=torch.float64)
        rhos += tracker.update(at, torch.tensor(rewards, dtype=torch.float64), given).tolist()
    expected = literal(visits, 20, mode, first=first)
    for ours, theirs in zip((values, rhos, tracker.a.tolist(), tracker.b.tolist()), expected, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-12)


def test_bounds_hold_whatever_comes():
    """a, b >= 0, v in [0, 1] and N0 <= a + b <= 1 / (1 - rho_max), the upper one approached when nothing moves."""
    tracker, rng = AutoAdaptiveValueTracker(prompts=3), torch.Generator().manual_seed(0)
    rows = torch.arange(3)
    for _ in range(300):
        rewards = torch.tensor([0.0, 1.0, torch.rand((), generator=rng)], dtype=torch.float64)
        rho = tracker.update(rows, rewards, torch.rand(3, generator=rng, dtype=torch.float64) * 0.05)
        visits = tracker.a + tracker.b
        assert (visits >= 8 - 1e-9).all() and (visits <= 25 + 1e-9).all()
        assert (tracker.a >= 0).all() and (tracker.b >= 0).all()
        assert (rho >= 0.875).all() and (rho <= 0.96).all()
    assert tracker.value()[0] < 1e-3 and tracker.value()[1] > 1 - 1e-3
    for _ in range(300):
        tracker.update(rows, torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))
    assert torch.allclose(tracker.a + tracker.b, torch.full((3,), 25.0, dtype=torch.float64), atol=1e-3)
    for _ in range(300):
        tracker.update(rows, torch.ones(3, dtype=torch.float64), torch.full((3,), 9.0, dtype=torch.float64))
    assert torch.allclose(tracker.a + tracker.b, torch.full((3,), 8.0, dtype=torch.float64), atol=1e-3)


def test_the_tutorials_lower_bound_forgets_faster_than_the_paper_allows():
    """Its clip is at 0.5 and its start worth 2 visits: one failure moves the value by a quarter, here by a twentieth."""
    paper, tutorial = AutoAdaptiveValueTracker(), AutoAdaptiveValueTracker(rho_min=0.5)
    for tracker, drop in ((paper, 0.0625), (tutorial, 0.25)):
        tracker.update(torch.tensor([0]), torch.tensor([0.0]), torch.tensor([9.0]))
        assert 0.5 - tracker.value().item() == pytest.approx(drop, abs=1e-9)


def test_a_global_tracker_visits_once_with_the_mean():
    tracker, one = AutoAdaptiveValueTracker(), AutoAdaptiveValueTracker()
    rho = tracker.update(
        torch.zeros(4, dtype=torch.long),
        torch.tensor([1.0, 0.0, 0.0, math.nan]),
        torch.tensor([0.01, 0.0, math.nan, 0.02]),
    )
    one.update(torch.tensor([0]), torch.tensor([1 / 3], dtype=torch.float64), torch.tensor([0.01]))
    assert (
        rho.shape == (4,)
        and torch.allclose(tracker.a, one.a, atol=1e-7)
        and torch.allclose(tracker.b, one.b, atol=1e-7)
    )


def test_what_has_no_reward_is_no_visit():
    tracker = AutoAdaptiveValueTracker(prompts=2)
    tracker.update(torch.tensor([0, 1]), torch.tensor([math.nan, 1.0]))
    assert (tracker.a[0], tracker.b[0]) == (4.0, 4.0) and tracker.a[1] == pytest.approx(0.9 * 4 + 1)


@pytest.mark.parametrize("reward", [-0.01, 1.5])
def test_rewards_outside_are_named(reward):
    with pytest.raises(ValueError, match=f"reward is {reward:g}.*from 0 to 1"):
        AutoAdaptiveValueTracker(prompts=2).update(torch.tensor([0, 1]), torch.tensor([0.5, reward]))


@pytest.mark.parametrize(
    "changes",
    [
        {"rho_mode": "often"},
        {"rho_const": 1.0},
        {"D_half": 0.0},
        {"rho_min": 0.97},
        {"rho_max": 1.0},
        {"initial_value": -0.1},
        {"prompts": 0},
    ],
    ids=str,
)
def test_bad_values_are_named(changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        AutoAdaptiveValueTracker(**changes)
