"""Losses of concept tokens besides cross-entropy."""

import torch


def ratio_loss(made: torch.Tensor, probability: torch.Tensor, target: float) -> torch.Tensor:
    """Ratio loss R / (R - 1) ((R - 1) F G + (1 - F)(1 - G)); 1 where F = G = 1 / R (H-Net, arXiv 2507.07955, eq. 10).

    Args:
        made: F, the share of tokens that became concepts; scalar, floating point.
        probability: G, the mean probability of a concept; scalar, floating point.
        target: R, the target number of tokens per concept.

    Returns:
        A scalar, floating point.
    """
    return target / (target - 1) * ((target - 1) * made * probability + (1 - made) * (1 - probability))
