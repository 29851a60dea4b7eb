"""How evenly codewords are used."""

import torch


def usage_kl_to_uniform(use: torch.Tensor) -> torch.Tensor:
    """KL(use || uniform), nats, mean over codebooks: log V where one codeword is all, 0 where all are used alike.

    Args:
        use (..., V): how often each codeword is used; need not add up to 1.
    """
    share = use / use.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return (torch.log(torch.tensor(use.shape[-1], dtype=use.dtype)) - entropy).mean()
