"""Token by token with three caches: shallow layers hold every token, middle ones the concepts, deep ones the concepts and
the tail, which goes when the next concept takes its place."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..residual import backbone_of
from .cache import SlotCache
from .forward import parallel_forward, run_layers
from .gate import Choice, chosen


@dataclass
class ConceptDecoder:
    """A batch of texts that go on, rows of any length.

    Attributes:
        caches: of the shallow, middle and deep layers.
        last_hidden_state: (B, d), normed, of each row's last token; for the LM head.
    """

    model: PreTrainedModel
    caches: tuple[SlotCache, SlotCache, SlotCache]
    last_hidden_state: torch.Tensor

    @classmethod
    @torch.no_grad()
    def prefill(
        cls,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        concepts: torch.Tensor | Callable[[torch.Tensor], Choice],
        attention_mask: torch.Tensor | None = None,
    ) -> "ConceptDecoder":
        """Reads texts (B, T), padded on either side, at once; arguments as of `parallel_forward`."""
        valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
        caches = (SlotCache(), SlotCache(), SlotCache())
        states = parallel_forward(model, input_ids, concepts, valid, caches=caches)
        last = torch.arange(valid.shape[1], device=valid.device).masked_fill(~valid, -1).amax(1)
        return cls(model, caches, states.last_hidden_state[torch.arange(len(last)), last])

    @torch.no_grad()
    def step(self, input_ids: torch.Tensor, concepts: torch.Tensor | Callable[[torch.Tensor], Choice]) -> torch.Tensor:
        """One more token (B,) for every row.

        Args:
            concepts: ids (B,) of the new tokens' concepts, or what chooses them from shallow states (B, d).

        Returns:
            `last_hidden_state` (B, d).
        """
        backbone = backbone_of(self.model)
        config = backbone.concept_config
        shallow, middle, deep = self.caches
        everyone = torch.arange(len(input_ids), device=input_ids.device)
        positions = shallow.lengths[:, None]
        seen = shallow.open(everyone)
        hidden = run_layers(
            backbone, config.parts[0], backbone.embed_tokens(input_ids[:, None]), seen, positions, shallow
        )
        choice = chosen(backbone, concepts, hidden[:, 0])
        concept = choice.ids != config.null
        rows = concept.nonzero()[:, 0]
        concepts_before = middle.lengths
        if len(rows):
            seen = middle.open(rows)
            read = run_layers(backbone, config.parts[1], choice.embeds[rows, None], seen, positions[rows], middle)
            hidden = hidden.index_copy(0, rows, read.to(hidden.dtype))
        seen = deep.open(everyone, torch.where(concept, concepts_before, deep.lengths))
        hidden = run_layers(backbone, config.parts[2], hidden, seen, positions, deep)
        self.last_hidden_state = backbone.norm(hidden)[:, 0]
        return self.last_hidden_state
