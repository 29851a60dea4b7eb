"""Who sees whom: causal among concepts, and in the deep layers every concept so far and the tail of tokens."""

from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass(frozen=True)
class Slots:
    """What stands in the deep layers' slots, in any order; all (B, S).

    Attributes:
        times: place of its token in the text. valid: real. concept: a concept, not a token.
        since: concepts of the row up to its token. documents: which text it is of, where rows are packed, or None.
    """

    times: torch.Tensor
    valid: torch.Tensor
    concept: torch.Tensor
    since: torch.Tensor
    documents: torch.Tensor | None = None

    def take(self, order: torch.Tensor) -> "Slots":
        """The slots at `order` (B, S')."""
        found = (self.times, self.valid, self.concept, self.since, self.documents)
        return Slots(*(None if x is None else x.gather(1, order) for x in found))

    def allowed(self, b: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Whether in row b slot q sees slot k: a concept the concepts so far, a token these and the tokens since the last.

        Indices that broadcast. What is not real sees itself alone, since a row of attention must not be empty.
        """
        seen = (self.times[b, k] <= self.times[b, q]) & self.valid[b, k]
        tail = ~self.concept[b, q] & (self.since[b, k] == self.since[b, q])
        seen = seen & (self.concept[b, k] | tail)
        if self.documents is not None:
            seen = seen & (self.documents[b, k] == self.documents[b, q])
        return seen | (q == k)

    def behind(self, past: "Slots") -> "Slots":
        """These slots, with others of the same texts before them."""
        both = zip(
            (past.times, past.valid, past.concept, past.since), (self.times, self.valid, self.concept, self.since)
        )
        times, valid, concept, since = (torch.cat(parts, dim=1) for parts in both)
        return Slots(times, valid, concept, since, self.documents)

    def dense_mask(self, first: int = 0) -> torch.Tensor:
        """(B, 1, S - first, S) bool, for SDPA: what the slots from `first` on see."""
        rows, slots = (torch.arange(n, device=self.times.device) for n in self.times.shape)
        return self.allowed(rows[:, None, None], slots[first:, None], slots)[:, None]

    def block_mask(self) -> BlockMask:
        """The same for FlexAttention, which skips blocks that nobody sees."""
        rows, slots = self.times.shape
        device = self.times.device
        return create_block_mask(
            lambda b, _, q, k: self.allowed(b, q, k), rows, None, slots, slots, device, _compile=device.type == "cuda"
        )


def before(mask: torch.Tensor | None, past: torch.Tensor, count: int) -> torch.Tensor | None:
    """A mask of `count` slots, as of `causal_mask`, with the slots of a cache before them, which all see where they are in
    use, `past` (B, P) bool."""
    rows, width = past.shape
    if not width:
        return mask
    if mask is None:
        mask = torch.ones(count, count, dtype=torch.bool, device=past.device).tril().expand(rows, 1, -1, -1)
    return torch.cat([past[:, None, None].expand(-1, -1, count, -1), mask], dim=-1)


def causal_mask(valid: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor | None:
    """(B, 1, T, T) bool of real slots (B, T): earlier ones and itself, of the same document; None where plain causal
    attention does, with nothing but padding behind the real slots."""
    if documents is None and (valid[:, 1:] <= valid[:, :-1]).all():
        return None
    times = torch.arange(valid.shape[1], device=valid.device)
    allowed = (times <= times[:, None]) & valid[:, None]
    if documents is not None:
        allowed = allowed & (documents[:, None] == documents[:, :, None])
    return (allowed | (times == times[:, None]))[:, None]
