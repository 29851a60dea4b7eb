"""How evenly the codewords of a codebook are used."""

import torch


def usage_kl_to_uniform(use: torch.Tensor) -> torch.Tensor:
    """KL(use || uniform) in nats, averaged over codebooks. Ours.

    It is log V if a single codeword takes all uses, and 0 if all are used equally often.

    Args:
        use (..., V): floating point; how often each codeword is used. It need not sum to 1.

    Returns:
        A scalar in the dtype of `use`.
    """
    share = use / use.sum(-1, keepdim=True)
    entropy = -torch.special.xlogy(share, share).sum(-1)
    return (torch.log(torch.tensor(use.shape[-1], dtype=use.dtype)) - entropy).mean()
