"""What the planner reads and writes: one row of slots, each with its position, and who may see whom.

A slot sees the slots before it that are real and either everybody's or of its own branch. Branches are the types that are
written in parallel, and the queries of a type: all of them share what the backbone has made of the text.
"""

import torch
from torch import nn
from transformers import DynamicCache

from ..common.layer_kinds import check_length


EVERYBODY = -1


class SlotSequence:
    """Slots are put behind one another (`add`) and run through the backbone together (`read`).

    Attributes:
        valid: (B, S) bool, slots that are real.
        branches: (S,) long.
    """

    def __init__(self, backbone: nn.Module, rows: int, device: torch.device, cached: bool = True):
        """With `cached` it can be read more than once.

        Raises:
            ValueError: gradient checkpointing is on, and `cached`: transformers drops the cache then.
        """
        if cached and backbone.training and getattr(backbone, "is_gradient_checkpointing", False):
            raise ValueError(
                "gradient checkpointing is on: transformers drops the cache in training then, and concepts would not see "
                "the text. Call model.gradient_checkpointing_disable()"
            )
        self.backbone = backbone
        self.cache = DynamicCache(config=backbone.config) if cached else None
        self.dtype = backbone.get_input_embeddings().weight.dtype
        self.valid = torch.zeros(rows, 0, dtype=torch.bool, device=device)
        self.branches = torch.zeros(0, dtype=torch.long, device=device)
        self._pending: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def length(self) -> int:
        return self.valid.shape[1]

    def add(
        self,
        embeds: torch.Tensor,
        positions: torch.Tensor,
        valid: torch.Tensor | None = None,
        branch: int = EVERYBODY,
    ) -> None:
        """Slots that the next `read` runs.

        Args:
            embeds: (B, q, d), or what broadcasts to it.
            positions: (B, q).
            valid: (B, q) bool; None: all.
            branch: whose they are.
        """
        valid = torch.ones_like(positions, dtype=torch.bool) if valid is None else valid
        self.valid = torch.cat([self.valid, valid], dim=1)
        self.branches = torch.cat([self.branches, self.branches.new_full((positions.shape[1],), branch)])
        self._pending.append((embeds.expand(*positions.shape, -1), positions))

    def read(self) -> torch.Tensor:
        """Final-norm hidden states (B, q, d) of all slots that were added since the last time."""
        check_length(self.backbone, self.length, "a plan")
        embeds, positions = (torch.cat(parts, dim=1) for parts in zip(*self._pending))
        self._pending = []
        return self.backbone(
            inputs_embeds=embeds.to(self.dtype),
            attention_mask=self._mask(positions.shape[1]),
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=self.cache is not None,
        ).last_hidden_state

    def _mask(self, count: int) -> torch.Tensor:
        slots = torch.arange(self.length, device=self.valid.device)
        own = self.branches == self.branches[-count:, None]
        mask = (slots <= slots[-count:, None]) & ((self.branches == EVERYBODY) | own) & self.valid[:, None]
        mask = (mask | (slots == slots[-count:, None]))[:, None]  # a row of attention must not be empty
        if self.backbone.config._attn_implementation == "eager":
            return torch.zeros_like(mask, dtype=self.dtype).masked_fill(~mask, torch.finfo(self.dtype).min)
        return mask

    def repeat(self, copies: int) -> None:
        """Every row so many times, one behind the other. Nothing may wait to be read."""
        self.cache.batch_repeat_interleave(copies)
        self.valid = self.valid.repeat_interleave(copies, dim=0)

    def reorder(self, rows: torch.Tensor) -> None:
        """Go on with these rows. Nothing may wait to be read."""
        self.cache.reorder_cache(rows)
        self.valid = self.valid[rows]
