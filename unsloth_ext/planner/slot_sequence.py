"""The sequence of slots that the planner reads and writes, with their positions and visibility.

A slot sees earlier slots that are real and belong to everybody or to its own branch. Branches are types written in
parallel, and the queries of a type. All branches share the backbone's cache of the text.
"""

import torch
from torch import nn
from transformers import DynamicCache

from ..common.compat import CACHE, CHECKPOINTING, is_checkpointing
from ..common.layer_kinds import check_length


EVERYBODY = -1


class SlotSequence:
    """Slots that are added one after another (`add`) and run through the backbone together (`read`).

    Args:
        backbone: the decoder.
        rows: B.
        device: the device of the slots.
        cached: whether the sequence can be read more than once.

    Attributes:
        valid (B, S): bool, slots that are real.
        branches (S,): long, the branch of each slot.

    Raises:
        ValueError: gradient checkpointing is on, and `cached`. transformers drops the cache then.
    """

    def __init__(self, backbone: nn.Module, rows: int, device: torch.device, cached: bool = True):
        if cached and backbone.training and is_checkpointing(backbone):
            raise ValueError(
                "gradient checkpointing is on: transformers then drops the cache in training, and concepts would not see "
                f"the text. Call model.{CHECKPOINTING}_disable()"
            )
        self.backbone = backbone
        self.cache = DynamicCache(config=backbone.config) if cached else None
        self.dtype = backbone.get_input_embeddings().weight.dtype
        self.valid = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self.branches = torch.zeros(0, dtype=torch.long, device=device)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def length(self) -> int:
        """S, the number of slots so far."""
        return self.valid.shape[1]

    def add(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor | None = None,
        branch: int = EVERYBODY,
    ) -> None:
        """Add slots for the next `read`.

        Args:
            embeds (B, q, d): floating point, or a shape that broadcasts to it.
            positions (B, q): long.
            valid (B, q): bool, which are real. None means all.
            branch: the branch that they belong to.
        """
        valid = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
        self.valid = torch.cat([self.valid, valid], dim=1)
        self.branches = torch.cat([self.branches, self.branches.new_full((positions.shape[1],), branch)])
        self._pending.append((embeds.expand(*positions.shape, -1), positions))

    def read(self) -> torch.Tensor:
        """Return hidden states after the final norm (B, q, d) of all slots added since the last read, in the model's
        dtype.
        """
        check_length(self.backbone, self.length, "a plan")
        embeds, positions = (torch.cat(parts, dim=1) for parts in zip(*self._pending))
        self._pending = []
        return self.backbone(
            inputs_embeds=embeds.to(self.dtype),
            attention_mask=self._mask(positions.shape[1]),
            position_ids=positions,
            use_cache=self.cache is not None,
            **{CACHE: self.cache},
        ).last_hidden_state

    def _mask(self, count: int) -> torch.Tensor:
        slots = torch.arange(self.length, device=self.valid.device)
        own = self.branches == self.branches[-count:, None]
        mask = (slots <= slots[-count:, None]) & ((self.branches == EVERYBODY) | own) & self.valid[:, None]
        mask = (mask | (slots == slots[-count:, None]))[:, None]  # an attention row must not be empty
        if self.backbone.config._attn_implementation == "eager":
            return torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)
        return mask

    def repeat(self, copies: int) -> None:
        """Repeat every row, copies next to each other. No slot may be pending."""
        self.cache.batch_repeat_interleave(copies)
        self.valid = self.valid.repeat_interleave(copies, dim=0)

    def reorder(self, rows: torch.Tensor) -> None:
        """Continue with these rows. No slot may be pending."""
        self.cache.reorder_cache(rows)
        self.valid = self.valid[rows]
