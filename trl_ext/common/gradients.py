"""Averaging of gradients over processes for modules that DDP does not wrap, such as a critic beside the policy."""

from collections.abc import Callable

import torch
from torch import nn


BUCKET = 2**25  # elements per reduction


def average_gradients(parameters: list[nn.Parameter], reduce: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Average gradients over processes, in place.

    A rank without a gradient counts as 0. A gradient stays None if no rank has one.

    Args:
        parameters: the same list on every process.
        reduce: returns the mean of a tensor over processes.
    """
    device = parameters[0].device
    some = reduce(torch.tensor([float(p.grad is not None) for p in parameters], device=device)) > 0
    buckets: dict[torch.dtype, list[list[nn.Parameter]]] = {}
    for parameter, there in zip(parameters, some.tolist()):
        if not there:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        same = buckets.setdefault(parameter.dtype, [[]])
        if sum(p.numel() for p in same[-1]) >= BUCKET:
            same.append([])
        same[-1].append(parameter)
    for together in (bucket for same in buckets.values() for bucket in same):
        mean = reduce(torch.cat([p.grad.flatten() for p in together]))
        for parameter, part in zip(together, mean.split([p.numel() for p in together])):
            parameter.grad.copy_(part.view_as(parameter))
