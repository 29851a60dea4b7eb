"""Discrete choices with a gradient: Gumbel noise, and the straight-through estimator (arXiv 1611.01144)."""

import torch


def gumbel_noise(like: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Standard Gumbel noise, -log(E) with E exponential.

    Args:
        like (...): floating point; gives shape, dtype and device.
        generator: on the device of `like`; None draws from the global one.

    Returns:
        (...) of the dtype of `like`.
    """
    drawn = torch.empty_like(like).exponential_(generator=generator)
    return -drawn.clamp(min=torch.finfo(like.dtype).tiny).log()


def straight_through(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """The value of `hard` (...), with the gradient of `soft` (...) beside its own. Both have the same shape and dtype."""
    return hard + (soft - soft.detach())
