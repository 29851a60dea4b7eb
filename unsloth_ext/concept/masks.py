"""Who sees whom: causal among concepts, and in the deep layers every concept so far and the tail of tokens."""

import torch


def causal_mask(valid: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
    """(B, 1, T, T) bool of real slots (B, T): earlier ones and itself, of the same document.

    What is not real sees itself alone, since a row of attention must not be empty.
    """
    times = torch.arange(valid.shape[1], device=valid.device)
    allowed = (times <= times[:, None]) & valid[:, None]
    if documents is not None:
        allowed = allowed & (documents[:, None] == documents[:, :, None])
    return (allowed | (times == times[:, None]))[:, None]


def deep_mask(concept: torch.Tensor, valid: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor:
    """(B, 1, T, T) bool for slots in place: slot t holds a concept where `concept` (B, T) and else a token.

    A concept sees the concepts so far; a token these and the tokens since the last of them.
    """
    since = concept.cumsum(1)
    tail = ~concept[:, :, None] & (since[:, :, None] == since[:, None])
    return causal_mask(valid, documents) & (concept[:, None] | tail)[:, None]
