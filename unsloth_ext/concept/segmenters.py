"""Segmenters, which decide which tokens end a concept (ours).

The same function handles whole texts and, with its state, the next token, so training and decoding agree.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .config import OnlineConceptConfig


@dataclass(frozen=True)
class Memory:
    """The state of a segmenter for each row's text.

    Attributes:
        position (B,): long, the number of tokens.
        since (B,): long, the number of tokens after the last concept.
        nulls (B,): long, the number of tokens that are no concept.
        charge (B,): fp64, the sum of the tokens' probabilities.
    """

    position: torch.Tensor
    since: torch.Tensor
    nulls: torch.Tensor
    charge: torch.Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "Memory":
        """Return the state before any token."""
        nothing = torch.zeros(rows, dtype=torch.long, device=device)
        return cls(nothing, nothing, nothing, nothing.double())

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Memory":
        """Apply `change` to every tensor, e.g. to select rows."""
        return Memory(*(change(x) for x in (self.position, self.since, self.nulls, self.charge)))


def boundaries(
    config: OnlineConceptConfig,
    score: torch.Tensor,
    valid: torch.Tensor,
    memory: Memory,
    length_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Memory]:
    """Decide which tokens become concepts.

    Args:
        config: the settings of the segmenter.
        score (B, N): floating point, the logit of each token for being a concept. Without gradients.
        valid (B, N): bool, real tokens, which come first in every row.
        memory: the state before these tokens.
        length_logits (max_tail,): floating point, of the autoregressive segmenter.

    Returns:
        The concepts (B, N) bool; the number of tokens (B, N) long of a concept that would end there; and the state
        after these tokens.
    """
    steps = torch.arange(1, score.shape[1] + 1, device=score.device)
    charge = memory.charge[:, None] + torch.where(valid, score.double().sigmoid(), 0).cumsum(1)
    if config.segmenter == "fixed":
        place = (memory.position[:, None] + steps - 1) % config.stride
        concept = place >= config.stride - config.concepts_per_stride
    elif config.segmenter == "threshold":
        before = torch.cat([memory.charge[:, None], charge[:, :-1]], dim=1)
        concept = charge.floor() > before.floor()
    elif config.segmenter == "autoregressive":
        concept = _chain(score, length_logits, memory.since)
    else:
        concept = score > 0
    concept = concept & valid
    if config.max_tail is not None:
        # A forced concept restarts the count as any other does, so they follow a chosen one at every max_tail
        concept = concept | (_since(concept, memory.since, steps) % config.max_tail == 0) & valid
    if config.max_nulls is not None:
        nulls = memory.nulls[:, None] + (~concept & valid).cumsum(1)
        concept = (concept | (nulls > config.max_nulls)) & valid
    ended = torch.nn.functional.pad(concept, (1, 0))[:, :-1]  # whether the token before ended a concept
    length = 1 + _since(ended, memory.since, steps - 1)
    count = valid.sum(1)
    last = (count - 1).clamp(min=0)[:, None]
    at_end = lambda x, before: torch.where(count > 0, x.gather(1, last)[:, 0], before)  # noqa: E731
    after = Memory(
        memory.position + count,
        at_end(_since(concept, memory.since, steps), memory.since),
        memory.nulls + (~concept & valid).sum(1),
        at_end(charge, memory.charge),
    )
    return concept, length, after


def _since(concept: torch.Tensor, before: torch.Tensor, steps: torch.Tensor) -> torch.Tensor:
    """Return the number of `steps` (N,) since the last concept, (B, N) long. `before` (B,) is that number for the text
    so far.
    """
    last = torch.where(concept, steps, -before[:, None].expand_as(concept)).cummax(1).values
    return steps - last


def _chain(score: torch.Tensor, length_logits: torch.Tensor, since: torch.Tensor) -> torch.Tensor:
    """Follow concepts one by one and return them, (B, N) bool.

    Each ends at the first length at which its logit plus the token's is positive, at the latest at the largest length.
    There is no loop over tokens: the next concept is computed for every token, and the chain is followed by doubling.
    """
    rows, width = score.shape
    most = len(length_logits)
    lengths = torch.arange(1, most + 1, device=score.device)
    before = -1 - since[:, None]  # the last concept so far comes first, then every token as if it were one
    start = torch.cat([before, torch.arange(width, device=score.device).expand(rows, -1)], dim=1)
    at = (start[..., None] + lengths).clamp(0, width - 1)
    row = torch.arange(rows, device=score.device)[:, None, None]
    ends = (score[row, at] + length_logits > 0) | (lengths == most)
    ends[:, 0] &= lengths > since[:, None]
    following = (start + 1 + ends.to(torch.uint8).argmax(-1)).clamp(max=width)
    # There is no next concept past the last token
    jump = torch.cat([following[:, 1:], following.new_full((rows, 1), width)], dim=1)
    reached = torch.zeros_like(jump, dtype=torch.bool).scatter(1, following[:, :1], True)
    span = 1
    while span <= width:
        reached = reached.scatter(1, torch.where(reached, jump, width), True)
        jump, span = jump.gather(1, jump), span * 2
    return reached[:, :-1]
