"""What stands in place of a thinking state or latent token to see what it contributes. Tensors (B, ..., d)."""

from collections.abc import Callable

import torch


def shuffled(x: torch.Tensor) -> torch.Tensor:
    """Another row's: right as a distribution, wrong for the row. A single row keeps its own."""
    return x.roll(1, dims=0)


def noise(x: torch.Tensor) -> torch.Tensor:
    """Gaussian, of the same norm at each position."""
    drawn = torch.randn_like(x)
    return drawn * (x.norm(dim=-1, keepdim=True) / drawn.norm(dim=-1, keepdim=True))


ABLATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "zero": torch.zeros_like,
    "shuffle": shuffled,
    "noise": noise,
}
