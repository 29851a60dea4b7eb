"""The cache of a model with concepts, whose layers hold different numbers of slots in each row (ours)."""

from collections.abc import Iterable
from typing import NoReturn

import torch

from .segmenters import Memory


class SlotCache:
    """The cache that attention modules write to and read from, in place of a `DynamicCache`.

    Without a `plan` (several tokens at once) keys and values are appended, and `keep` then packs each row. With a plan
    (decoding, one slot in each row) they are written to the slots that it names.

    Attributes:
        lengths (B,): long, the slots in use, which come first in every row.
        plan (R,): long, the rows that are written. None without a plan.
        width: the number of slots before those that are written without a plan.
    """

    def __init__(self):
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}
        self.lengths = torch.zeros(0, dtype=torch.long)
        self.plan: torch.Tensor | None = None
        self.width = 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer_idx: int, *_, **__
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values (R, H, q, D) that the queries of layer `layer_idx` may see."""
        if self.plan is None:
            for store, new in ((self.keys, keys), (self.values, values)):
                there = self.width > 0
                store[layer_idx] = torch.cat([store[layer_idx][:, :, : self.width], new], dim=2) if there else new
            return self.keys[layer_idx], self.values[layer_idx]
        slots, most = self.lengths[self.plan] - 1, int(self.lengths[self.plan].max())
        out = []
        for store, new in ((self.keys, keys), (self.values, values)):
            if layer_idx not in store:
                store[layer_idx] = new.new_zeros(len(self.lengths), new.shape[1], 0, new.shape[3])
            held = store[layer_idx]
            if held.shape[2] < most:  # doubling makes the cost of growth constant per token
                more = held.new_zeros(*held.shape[:2], max(most, 2 * held.shape[2]) - held.shape[2], held.shape[3])
                held = store[layer_idx] = torch.cat([held, more], dim=2)
            held[self.plan, :, slots] = new[:, :, 0]
            whole = len(self.plan) == len(self.lengths)
            out.append(held[:, :, :most] if whole else held[self.plan, :, :most])
        return out[0], out[1]

    def extend(self, rows: int, device: torch.device) -> torch.Tensor:
        """Prepare for several tokens at once.

        Args:
            rows: B.
            device: the device of the slots.

        Returns:
            (B, P) bool: the slots in use, where P is the number of the fullest row.
        """
        if not len(self.lengths):
            self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.plan, self.width = None, int(self.lengths.max())
        return torch.arange(self.width, device=device) < self.lengths[:, None]

    def keep(self, used: torch.Tensor) -> None:
        """Keep, after several tokens at once, the slots `used` (B, S) bool of each row, in their order."""
        self.lengths = used.sum(1)
        order = used_first(used)
        for store in (self.keys, self.values):
            for layer, held in store.items():
                across = order[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
                store[layer] = held.gather(2, across)

    def select(self, rows: torch.Tensor) -> None:
        """Select rows by their indices (R,) long."""
        self.lengths = self.lengths[rows]
        for store in (self.keys, self.values):
            for layer, held in store.items():
                store[layer] = held[rows]

    def num_bytes(self) -> int:
        """Return the number of bytes of the slots in use."""
        tensors = (x for store in (self.keys, self.values) for x in store.values())
        return sum(x.shape[1] * x.shape[3] * x.element_size() for x in tensors) * int(self.lengths.sum())

    def open(self, rows: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """Open a new slot in some rows.

        Args:
            rows (R,): long, the rows.
            at (R,): long, the place of the new slot, which ends the row: later slots are dropped. None appends.

        Returns:
            (R, 1, 1, n) bool: which slots the new one sees.
        """
        self.plan = rows
        self.lengths = self.lengths.clone()
        self.lengths[rows] = (self.lengths[rows] if at is None else at) + 1
        new = self.lengths[rows]
        return (torch.arange(int(new.max()), device=rows.device) < new[:, None])[:, None, None]


class ConceptCache:
    """The cache of a model with concepts, in place of a `DynamicCache`.

    Shallow layers hold every token, middle layers the concepts, deep layers the concepts and the tail of tokens. The
    next concept replaces the tail.

    Attributes:
        layers: the caches of the shallow, middle and deep layers.
        memory: the state of the segmenter for each text. None if concepts were given.
        seen: the number of tokens of a row, padding included.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)

    def __init__(self):
        self.layers = (SlotCache(), SlotCache(), SlotCache())
        self.memory: Memory | None = None
        self.seen = 0

    def keep(self, used: Iterable[torch.Tensor], tokens: int, memory: Memory | None) -> None:
        """Keep some of the slots of several new tokens.

        Args:
            used: for shallow, middle and deep layers (B, S) bool, the slots to keep.
            tokens: the number of new tokens.
            memory: the new state of the segmenter.
        """
        for layers, slots in zip(self.layers, used):
            layers.keep(slots)
        self.memory, self.seen = memory, self.seen + tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens so far, as `generate` counts them."""
        return self.seen

    def num_bytes(self) -> int:
        """Return the number of bytes of the keys and values in use, over all rows."""
        return sum(layers.num_bytes() for layers in self.layers)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Select rows by their indices (R,) long."""
        for layers in self.layers:
            layers.select(indices)
        self.memory = self.memory and self.memory.map(lambda x: x[indices])

    reorder_cache = batch_select_indices  # the name in beam search

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row, copies next to each other."""
        rows = torch.arange(len(self.layers[0].lengths), device=self.layers[0].lengths.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, max_length: int) -> NoReturn:
        """Refuse to remove tokens, since a tail that became a concept is gone.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "tokens cannot be removed from concepts, so assisted decoding does not work: use sampling, greedy decoding or "
            "beams"
        )


def used_first(used: torch.Tensor, least: int = 0) -> torch.Tensor:
    """Return indices (B, n) of the slots `used` (B, T) bool, in their order.

    n is the number of the fullest row, and at least `least`. Other rows are filled with arbitrary indices.
    """
    return (~used).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(least, int(used.sum(1).max()))]
