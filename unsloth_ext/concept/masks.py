"""Attention masks of concepts: causal, and in deep layers all concepts so far and the tail of tokens (ours)."""

from dataclasses import dataclass

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass(frozen=True)
class Slots:
    """The slots of the deep layers, in any order.

    Attributes:
        times (B, S): long, the place of the slot's token in the text.
        valid (B, S): bool, real slots.
        concept (B, S): bool, slots of concepts and not of tokens.
        since (B, S): long, the number of concepts of the row up to the slot's token.
        documents (B, S): long, the slot's text in packed rows. None without packing.
    """

    times: torch.Tensor
    valid: torch.Tensor
    concept: torch.Tensor
    since: torch.Tensor
    documents: torch.Tensor | None = None

    def take(self, order: torch.Tensor) -> "Slots":
        """Return the slots at `order` (B, S') long."""
        found = (self.times, self.valid, self.concept, self.since, self.documents)
        return Slots(*(None if x is None else x.gather(1, order) for x in found))

    def allowed(self, b: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Return whether in row b slot q sees slot k. The indices broadcast.

        A concept sees the concepts so far. A token sees these and the tokens since the last one. Slots that are not
        real see only themselves, since an attention row must not be empty.
        """
        seen = (self.times[b, k] <= self.times[b, q]) & self.valid[b, k]
        tail = ~self.concept[b, q] & (self.since[b, k] == self.since[b, q])
        seen = seen & (self.concept[b, k] | tail)
        if self.documents is not None:
            seen = seen & (self.documents[b, k] == self.documents[b, q])
        return seen | (q == k)

    def behind(self, past: "Slots") -> "Slots":
        """Return these slots after others of the same texts."""
        pairs = zip(
            (past.times, past.valid, past.concept, past.since), (self.times, self.valid, self.concept, self.since)
        )
        times, valid, concept, since = (torch.cat(parts, dim=1) for parts in pairs)
        return Slots(times, valid, concept, since, self.documents)

    def dense_mask(self, first: int = 0) -> torch.Tensor:
        """Return the mask (B, 1, S - first, S) bool for SDPA: what the slots from `first` on see."""
        rows, slots = (torch.arange(n, device=self.times.device) for n in self.times.shape)
        return self.allowed(rows[:, None, None], slots[first:, None], slots)[:, None]

    def block_mask(self) -> BlockMask:
        """Return the mask for FlexAttention, which skips blocks that no query sees."""
        rows, slots = self.times.shape
        device = self.times.device
        return create_block_mask(
            lambda b, _, q, k: self.allowed(b, q, k), rows, None, slots, slots, device, _compile=device.type == "cuda"
        )


def before(mask: torch.Tensor | None, past: torch.Tensor, count: int) -> torch.Tensor | None:
    """Extend a mask of `count` slots, as from `causal_mask`, by the slots of a cache before them, `past` (B, P) bool.

    All new slots see the cached slots that are in use.
    """
    rows, width = past.shape
    if not width:
        return mask
    if mask is None:
        mask = torch.ones(count, count, dtype=torch.bool, device=past.device).tril().expand(rows, 1, -1, -1)
    return torch.cat([past[:, None, None].expand(-1, -1, count, -1), mask], dim=-1)


def causal_mask(valid: torch.Tensor, documents: torch.Tensor | None = None) -> torch.Tensor | None:
    """Return the causal mask (B, 1, T, T) bool of real slots (B, T), within each document.

    None means that plain causal attention is enough: there is only padding after the real slots.
    """
    if documents is None and (valid[:, 1:] <= valid[:, :-1]).all():
        return None
    times = torch.arange(valid.shape[1], device=valid.device)
    allowed = (times <= times[:, None]) & valid[:, None]
    if documents is not None:
        allowed = allowed & (documents[:, None] == documents[:, :, None])
    return (allowed | (times == times[:, None]))[:, None]
