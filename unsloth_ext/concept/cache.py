"""What decoding goes on from: keys and values of layers that hold another number of slots in every row."""

from collections.abc import Iterable
from typing import NoReturn

import torch

from .segmenters import Memory


class SlotCache:
    """What attention modules write to and read from, in place of a `DynamicCache`.

    While `plan` is None (several tokens at once) keys and values are put behind what is there, and `keep` then packs each
    row. With a plan (decoding, one slot a row) they are written where it says.

    Attributes:
        lengths: (B,) long, slots in use; they come first in every row.
        plan: rows (R,) long that are written, or None. width: slots before those that are written without one.
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
        """Keys and values (R, H, q, D) that the queries of layer `layer_idx` may see."""
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
            if held.shape[2] < most:  # twice as many, so that growing costs nothing in the long run
                more = held.new_zeros(*held.shape[:2], max(most, 2 * held.shape[2]) - held.shape[2], held.shape[3])
                held = store[layer_idx] = torch.cat([held, more], dim=2)
            held[self.plan, :, slots] = new[:, :, 0]
            whole = len(self.plan) == len(self.lengths)
            out.append(held[:, :, :most] if whole else held[self.plan, :, :most])
        return out[0], out[1]

    def extend(self, rows: int, device: torch.device) -> torch.Tensor:
        """Before several tokens at once.

        Returns:
            (B, P) bool: slots in use, of as many as the fullest row has.
        """
        if not len(self.lengths):
            self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.plan, self.width = None, int(self.lengths.max())
        return torch.arange(self.width, device=device) < self.lengths[:, None]

    def keep(self, used: torch.Tensor) -> None:
        """After several tokens at once: of each row the slots `used` (B, S) bool, in their order."""
        self.lengths = used.sum(1)
        order = used_first(used)
        for store in (self.keys, self.values):
            for layer, held in store.items():
                across = order[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
                store[layer] = held.gather(2, across)

    def select(self, rows: torch.Tensor) -> None:
        """Other rows, by their indices (R,)."""
        self.lengths = self.lengths[rows]
        for store in (self.keys, self.values):
            for layer, held in store.items():
                store[layer] = held[rows]

    def num_bytes(self) -> int:
        """Of the slots in use."""
        each = (x for store in (self.keys, self.values) for x in store.values())
        return sum(x.shape[1] * x.shape[3] * x.element_size() for x in each) * int(self.lengths.sum())

    def open(self, rows: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """A new slot for each of `rows` (R,), behind the others or `at` (R,), from where on what was there is gone.

        Returns:
            (R, 1, 1, n) bool: which slots the new one sees.
        """
        self.plan = rows
        self.lengths = self.lengths.clone()
        self.lengths[rows] = (self.lengths[rows] if at is None else at) + 1
        new = self.lengths[rows]
        return (torch.arange(int(new.max()), device=rows.device) < new[:, None])[:, None, None]


class ConceptCache:
    """Three caches, in place of a `DynamicCache`: shallow layers hold every token, middle ones the concepts, deep ones the
    concepts and the tail, which goes when the next concept takes its place.

    Attributes:
        layers: of the shallow, middle and deep layers.
        memory: what the segmenter knows of the texts; None where concepts were given.
        seen: tokens of a row, padding among them.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self):
        self.layers = (SlotCache(), SlotCache(), SlotCache())
        self.memory: Memory | None = None
        self.seen = 0

    def keep(self, used: Iterable[torch.Tensor], tokens: int, memory: Memory | None) -> None:
        """After so many tokens at once, what is kept of the slots (B, S) of shallow, middle and deep layers."""
        for layers, slots in zip(self.layers, used):
            layers.keep(slots)
        self.memory, self.seen = memory, self.seen + tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, as `generate` counts them."""
        return self.seen

    def num_bytes(self) -> int:
        """Of the keys and values in use, over all rows."""
        return sum(layers.num_bytes() for layers in self.layers)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Other rows."""
        for layers in self.layers:
            layers.select(indices)
        self.memory = self.memory and self.memory.map(lambda x: x[indices])

    reorder_cache = batch_select_indices  # as beam search calls it

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row so many times."""
        rows = torch.arange(len(self.layers[0].lengths), device=self.layers[0].lengths.device)
        self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, max_length: int) -> NoReturn:
        """Raises a ValueError: a tail that was compressed is gone."""
        raise ValueError("tokens cannot be taken back out of concepts: no assisted decoding; sample, greedy or beams")


def used_first(used: torch.Tensor, least: int = 0) -> torch.Tensor:
    """Indices (B, n) of the slots `used` (B, T) bool, in their order; n as in the fullest row, at least `least`, the others
    filled up with any."""
    return (~used).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(least, int(used.sum(1).max()))]
