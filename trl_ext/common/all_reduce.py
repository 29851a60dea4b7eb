"""Sums over all processes that keep gradients correct."""

from collections.abc import Callable

import torch


def all_reduce_sum(local: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor], processes: int) -> torch.Tensor:
    """Sum a tensor over processes; gradients flow to this process's summand.

    The gradient is multiplied by `processes`, because DDP later averages gradients over processes.

    Args:
        local (...): floating point; this process's summand.
        reduce: returns the sum of a tensor over processes.
        processes: number of processes.

    Returns:
        The sum (...), in the dtype of `local`.
    """
    if processes == 1:
        return local
    return processes * local + (reduce(local.detach()) - processes * local.detach())
