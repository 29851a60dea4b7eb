"""Discrete choices with a gradient: Gumbel noise, and the straight-through estimator (arXiv 1611.01144)."""

import torch


def gumbel_noise(like: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw standard Gumbel noise, -log(E) with E exponential.

    Args:
        like (...): floating point. Gives shape, dtype and device.
        generator: on the device of `like`. None uses the global one.

    Returns:
        (...) in the dtype of `like`.
    """
    drawn = torch.empty_like(like).exponential_(generator=generator)
    return -drawn.clamp(min=torch.finfo(like.dtype).tiny).log()


def straight_through(hard: torch.Tensor, soft: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the value of `hard` and the gradients of both `hard` and `soft`.

    Args:
        hard (...): floating point.
        soft (...): in the dtype of `hard`.

    Returns:
        (...) in the same dtype.
    """
    return hard + (soft - soft.detach())
