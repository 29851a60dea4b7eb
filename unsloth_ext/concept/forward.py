"""The exact parallel forward: what decoding token by token would compute, without a loop over tokens.

Slot t holds middle(concept_t) where token t became a concept, and its shallow state where it did not; the logits of
position t are read at slot t, which also covers a tail that has just become empty. Rotary positions stay those of the text.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from ..residual import backbone_of
from .cache import SlotCache, used_first
from .gate import Choice, chosen
from .masks import causal_mask, deep_mask


@dataclass(frozen=True)
class ConceptStates:
    """What the parallel forward computes.

    Attributes:
        last_hidden_state: (B, T, d), normed; for the LM head.
        shallow: (B, T, d), what the head reads.
        concept: (B, T) bool, which tokens became concepts.
    """

    last_hidden_state: torch.Tensor
    shallow: torch.Tensor
    concept: torch.Tensor


def run_layers(
    backbone: nn.Module,
    layers: Iterable[int],
    hidden: torch.Tensor,
    mask: torch.Tensor,
    positions: torch.Tensor,
    cache: SlotCache | None = None,
) -> torch.Tensor:
    """Decoder layers on hidden states (B, T, d), with a mask (B, 1, T, keys) bool and rotary positions (B, T)."""
    rotary = backbone.rotary_emb(hidden, position_ids=positions)
    for i in layers:
        hidden = backbone.layers[i](
            hidden,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=rotary,
            past_key_values=cache,
            use_cache=cache is not None,
        )
    return hidden


def run_middle(
    backbone: nn.Module,
    concept: torch.Tensor,
    embeds: torch.Tensor,
    positions: torch.Tensor,
    documents: torch.Tensor | None = None,
    cache: SlotCache | None = None,
) -> torch.Tensor:
    """The middle layers on concepts alone.

    Args:
        concept (B, T) bool: where there is one. embeds (B, T, d): their embeddings; elsewhere not looked at.

    Returns:
        (B, T, d): in place where there is a concept, 0 elsewhere.
    """
    order = used_first(concept)
    out = torch.zeros_like(embeds)
    if not order.shape[1]:
        if cache is not None:
            cache.lengths = concept.sum(1)
        return out
    valid = concept.gather(1, order)
    across = order[..., None].expand(-1, -1, embeds.shape[-1])
    documents = None if documents is None else documents.gather(1, order)
    hidden = run_layers(
        backbone,
        backbone.concept_config.parts[1],
        embeds.gather(1, across),
        causal_mask(valid, documents),
        positions.gather(1, order),
        cache,
    )
    if cache is not None:
        cache.keep(valid)
    return out.scatter(1, across, hidden * valid[..., None])


def parallel_forward(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    concepts: torch.Tensor | Callable[[torch.Tensor], Choice],
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    documents: torch.Tensor | None = None,
    caches: tuple[SlotCache, SlotCache, SlotCache] | None = None,
) -> ConceptStates:
    """All positions at once.

    Args:
        input_ids (B, T) long.
        concepts: of each token its concept or `<NULL>`, ids (B, T) long, or what chooses them from shallow states
            (B, T, d).
        attention_mask (B, T): real tokens; None: all. position_ids (B, T): None counts the real ones.
        documents (B, T) long: which text a token is of, where rows are packed.
        caches: of the shallow, middle and deep layers, to go on decoding from.
    """
    caches = caches or (None, None, None)
    backbone = backbone_of(model)
    config = backbone.concept_config
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if position_ids is None:
        position_ids = (valid.cumsum(1) - 1).clamp(min=0)
    shallow = run_layers(
        backbone,
        config.parts[0],
        backbone.embed_tokens(input_ids),
        causal_mask(valid, documents),
        position_ids,
        caches[0],
    )
    choice = chosen(backbone, concepts, shallow)
    concept = (choice.ids != config.null) & valid
    middle = run_middle(backbone, concept, choice.embeds, position_ids, documents, caches[1])
    slots = torch.where(concept[..., None], middle, shallow)
    deep = run_layers(backbone, config.parts[2], slots, deep_mask(concept, valid, documents), position_ids, caches[2])
    if caches[0] is not None:
        caches[0].keep(valid)
        since = concept.cumsum(1)
        caches[2].keep(valid & (concept | (since == since[:, -1:])))
    return ConceptStates(backbone.norm(deep), shallow, concept)
