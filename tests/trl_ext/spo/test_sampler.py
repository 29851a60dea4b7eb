"""Frequencies against their weights, and draws that a resumed run repeats."""

import itertools

import pytest
import torch

from trl_ext.spo.sampler import PrioritizedSampler


V = torch.tensor([0.5, 0.9, 0.1, 0.0, 1.0, 0.99], dtype=torch.float64)


def sampler(values=V, batch_size=1, repeat_count=1, seed=0, **changes):
    return PrioritizedSampler(lambda: values, len(values), batch_size, repeat_count, seed, **changes)


def test_frequencies_are_the_weights():
    """30,000 draws of one; each within 4 standard errors of sqrt(v (1 - v)) + 0.05, normalised."""
    ours = sampler()
    rows = torch.tensor(list(itertools.chain.from_iterable(ours for _ in range(5000))))
    weights = (V * (1 - V)).sqrt() + 0.05
    share = weights / weights.sum()
    found = rows.bincount(minlength=len(V)) / len(rows)
    assert ((found - share).abs() <= 4 * (share * (1 - share) / len(rows)).sqrt()).all()
    assert found[3] > 0 and found[4] > 0  # certain ones still come


def test_pairs_come_as_drawn_one_after_the_other_without_replacement():
    """P(first i, then j) = w_i w_j / (1 - w_i); 20,000 rollouts, 4.5 standard errors."""
    ours = sampler(batch_size=2)
    rows = torch.tensor(list(itertools.chain.from_iterable(ours for _ in range(6667)))).view(-1, 2)
    assert (rows[:, 0] != rows[:, 1]).all()
    weights = (V * (1 - V)).sqrt() + 0.05
    share = weights / weights.sum()
    for i, j in itertools.combinations(range(len(V)), 2):
        expected = share[i] * share[j] * (1 / (1 - share[i]) + 1 / (1 - share[j]))
        found = (((rows == i).any(1)) & ((rows == j).any(1))).double().mean()
        assert abs(found - expected) <= 4.5 * (expected * (1 - expected) / len(rows)).sqrt(), (i, j)


def test_length_repeats_and_values_read_late():
    values = [V]
    ours = PrioritizedSampler(lambda: values[0], 6, 4, 3, 0)
    assert len(ours) == 12 == len(list(ours))
    ours = PrioritizedSampler(lambda: values[0], 6, 3, 2, 0)
    rows = iter(ours)
    first = [next(rows) for _ in range(6)]
    assert first[:3] == first[3:]
    values[0] = torch.tensor([0, 0, 0, 0.5, 0.5, 0.5], dtype=torch.float64)
    assert len(list(rows)) == 6


@pytest.mark.parametrize("drawn", [1, 2, 5])
def test_a_resumed_epoch_repeats_its_draws_and_goes_on(drawn):
    ours = sampler(torch.rand(24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), 4, 2)
    list(ours)  # an epoch before
    rows = iter(ours)
    for _ in range(8 * drawn):
        next(rows)
    state = {name: x.clone() for name, x in ours.state_dict().items()}
    rest = list(rows)
    resumed = sampler(ours.values(), 4, 2, seed=7)
    resumed.load_state_dict(state)
    again = list(resumed)
    assert again[8 * drawn :] == rest and len(again) == 48
    assert list(resumed) == list(ours)  # and the epoch after


def test_an_epoch_that_is_over_is_not_repeated():
    ours = sampler(batch_size=2)
    list(ours)
    resumed = sampler(batch_size=2, seed=3)
    resumed.load_state_dict(ours.state_dict(over=True))
    assert list(resumed) == list(ours)
