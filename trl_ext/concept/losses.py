"""Terms beside cross-entropy, each of sums over all processes' tokens."""

import torch


def ratio_loss(made: torch.Tensor, probability: torch.Tensor, target: float) -> torch.Tensor:
    """R / (R - 1) ((R - 1) F G + (1 - F)(1 - G)), 1 where F = G = 1 / R (H-Net, arXiv 2507.07955, eq. 10).

    Args:
        made: F, share of the tokens that became concepts. probability: G, mean probability. target: R.
    """
    return target / (target - 1) * ((target - 1) * made * probability + (1 - made) * (1 - probability))
