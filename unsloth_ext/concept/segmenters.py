"""Which tokens end a concept. One function decides for whole texts and, with what it remembers of them, for the next token:
what training does is what decoding does.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .config import OnlineConceptConfig


@dataclass(frozen=True)
class Memory:
    """What a segmenter knows of each row's text so far; all (B,).

    Attributes:
        position: tokens. since: tokens after the last concept. nulls: tokens that are no concept.
        charge: the sum of their probabilities, fp64.
    """

    position: torch.Tensor
    since: torch.Tensor
    nulls: torch.Tensor
    charge: torch.Tensor

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "Memory":
        nothing = torch.zeros(rows, dtype=torch.long, device=device)
        return cls(nothing, nothing, nothing, nothing.double())

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Memory":
        """Every tensor by `change`, such as other rows."""
        return Memory(*(change(x) for x in (self.position, self.since, self.nulls, self.charge)))


def boundaries(
    config: OnlineConceptConfig,
    score: torch.Tensor,
    valid: torch.Tensor,
    memory: Memory,
    length_logits: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, Memory]:
    """What becomes a concept.

    Args:
        score (B, N): logit of each token's being a concept, by itself. Without gradients.
        valid (B, N) bool: real tokens, which come first in every row.
        memory: of the texts before these tokens.
        length_logits (max_tail,): of the autoregressive segmenter.

    Returns:
        concept (B, N) bool; length (B, N) long, how many tokens a concept that ended here would stand for; the memory after
        these tokens.
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
        # A forced concept starts a new count as a wanted one does, so they follow a wanted one at every max_tail
        concept = concept | (_since(concept, memory.since, steps) % config.max_tail == 0) & valid
    if config.max_nulls is not None:
        nulls = memory.nulls[:, None] + (~concept & valid).cumsum(1)
        concept = (concept | (nulls > config.max_nulls)) & valid
    ended = torch.nn.functional.pad(concept, (1, 0))[:, :-1]  # with the token before
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
    """(B, N) long: how many `steps` (N,) after the last concept; `before` (B,) says it of the text so far."""
    last = torch.where(concept, steps, -before[:, None].expand_as(concept)).cummax(1).values
    return steps - last


def _chain(score: torch.Tensor, length_logits: torch.Tensor, since: torch.Tensor) -> torch.Tensor:
    """(B, N) bool: from concept to concept, each at the first length whose logit and the token's are together positive, at
    the longest anyway. No loop over tokens: which concept would follow on every token, then the chain by doubling."""
    rows, width = score.shape
    most = len(length_logits)
    lengths = torch.arange(1, most + 1, device=score.device)
    before = -1 - since[:, None]  # the last concept of the text so far; then every token, as if it were one
    start = torch.cat([before, torch.arange(width, device=score.device).expand(rows, -1)], dim=1)
    at = (start[..., None] + lengths).clamp(0, width - 1)
    row = torch.arange(rows, device=score.device)[:, None, None]
    ends = (score[row, at] + length_logits > 0) | (lengths == most)
    ends[:, 0] &= lengths > since[:, None]
    following = (start + 1 + ends.to(torch.uint8).argmax(-1)).clamp(max=width)
    jump = torch.cat([following[:, 1:], following.new_full((rows, 1), width)], dim=1)  # behind the last token: nowhere
    reached = torch.zeros_like(jump, dtype=torch.bool).scatter(1, following[:, :1], True)
    span = 1
    while span <= width:
        reached = reached.scatter(1, torch.where(reached, jump, width), True)
        jump, span = jump.gather(1, jump), span * 2
    return reached[:, :-1]
