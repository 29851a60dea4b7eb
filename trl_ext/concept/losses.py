"""Terms beside cross-entropy, each of sums over all processes' tokens."""

from collections.abc import Callable

import torch


def everywhere(local: torch.Tensor, reduce: Callable[[torch.Tensor], torch.Tensor], processes: int) -> torch.Tensor:
    """The sum over processes, by `reduce`, of what each has; with the gradient that their mean makes whole."""
    if processes == 1:
        return local
    return processes * local + (reduce(local.detach()) - processes * local.detach())


def ratio_loss(made: torch.Tensor, probability: torch.Tensor, target: float) -> torch.Tensor:
    """R / (R - 1) ((R - 1) F G + (1 - F)(1 - G)), 1 where F = G = 1 / R (H-Net, arXiv 2507.07955, eq. 10).

    Args:
        made: F, share of the tokens that became concepts. probability: G, mean probability. target: R.
    """
    return target / (target - 1) * ((target - 1) * made * probability + (1 - made) * (1 - probability))


def usage_kl_to_uniform(use: torch.Tensor) -> torch.Tensor:
    """KL(use || uniform), nats, mean over codebooks: log V where one codeword is all, 0 where all are used alike.

    Args:
        use (..., V): how often each codeword is used; need not add up to 1.
    """
    share = use / use.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return (torch.log(torch.tensor(use.shape[-1], dtype=use.dtype)) - entropy).mean()
