"""Ablations that replace a thinking state or latent token, to measure what it contributes. Tensors are (B, ..., d)."""

from collections.abc import Callable

import torch


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """Give each row the states of another row of the batch. A single row keeps its own."""
    return x.roll(1, dims=0)


def halfway(x: torch.Tensor) -> torch.Tensor:
    """Move each row's states halfway to those of another row. A single row keeps its own."""
    return torch.lerp(x, shuffled(x), 0.5)


def noise(x: torch.Tensor) -> torch.Tensor:
    """Draw Gaussian noise with the norm that `x` has at each position."""
    drawn = torch.randn_like(x)
    return drawn * (x.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))


ABLATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zero": torch.zeros_like,
    "shuffle": shuffled,
    "noise": noise,
    "interpolate": halfway,
}
