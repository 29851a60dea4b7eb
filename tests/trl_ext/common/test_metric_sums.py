"""Sums of several batches and processes."""

import pytest
import torch

from trl_ext.common.metric_sums import Sums


def test_means_are_of_all_batches():
    sums = Sums()
    for total, count in ((6.0, 2), (1.0, 1), (0.0, 0)):
        sums.weigh(
            {"mean": (torch.tensor(total), torch.tensor(count)), "nothing": (torch.tensor(0.0), torch.tensor(0))}
        )
        sums.add(use=torch.tensor([[total, 1.0]]))
    found, means = sums.pop(lambda x: 2 * x)  # two processes with the same
    assert means == {"mean": pytest.approx(7 / 3)} and found["use"].tolist() == [14.0, 6.0]
    assert sums.pop(lambda x: x) == ({}, {})
