"""The forward of a model with concepts. Whole texts go through at once: what decoding token by token would compute, without
a loop over tokens.

Slot t of the deep layers holds middle(concept_t) where token t became a concept, and its shallow state where it did not.
Logits of position t are read at slot t, which also covers a tail that has just become empty. Rotary positions stay those of
the text.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..common.layer_kinds import check_length
from .cache import ConceptCache, SlotCache, used_first
from .flex_attention import FLEX, flex_from
from .gate import Choice, decide, given
from .masks import Slots, before, causal_mask
from .packing import Texts
from .segmenters import Memory


@dataclass
class ConceptOutput(BaseModelOutputWithPast):
    """What the decoder returns: as without concepts, and

    Attributes:
        shallow: (B, T, d), what the head reads.
        choice: a `Choice`, which tokens became which concepts.
        valid: (B, T) bool, real tokens.
    """

    shallow: torch.Tensor | None = None
    choice: Choice | None = None
    valid: torch.Tensor | None = None


def run_layers(
    backbone: nn.Module,
    layers: Iterable[int],
    hidden: torch.Tensor,
    mask: torch.Tensor | BlockMask | None,
    positions: torch.Tensor,
    cache: SlotCache | None = None,
) -> torch.Tensor:
    """Decoder layers on hidden states (B, T, d), with a mask (B, 1, T, keys) bool and rotary positions (B, T)."""
    rotary = backbone.rotary_emb(hidden, position_ids=positions)
    with attention(backbone, FLEX) if isinstance(mask, BlockMask) else contextlib.nullcontext():
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


@contextlib.contextmanager
def attention(backbone: nn.Module, name: str) -> Iterator[None]:
    """Another attention function for the block."""
    kept = backbone.config._attn_implementation
    backbone.config._attn_implementation = name
    try:
        yield
    finally:
        backbone.config._attn_implementation = kept


def concept_forward(
    backbone: nn.Module,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    past_key_values: Any = None,
    inputs_embeds: torch.Tensor | None = None,
    use_cache: bool | None = None,
    concepts: torch.Tensor | None = None,
    **_: Any,
) -> ConceptOutput:
    """The decoder's forward, in place of its class's.

    Args:
        input_ids (B, T) long, or inputs_embeds (B, T, d).
        attention_mask (B, T), or (B, S) with those in the cache: real tokens, padded on either side; None: all.
        position_ids (B, T): None counts the real tokens. Without a mask, every 0 in them begins another text of a packed
            row.
        past_key_values: a `ConceptCache` to go on from; any other cache that is still empty, or None, begins one.
        concepts: of each token its concept or `<NULL>`, (B, T) or (B, T, C) long, in place of the head's decision.

    Raises:
        ValueError: both or neither of ids and embeddings, a mask that is not (B, T), or another kind of cache with tokens
            in it.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.dim() != 2):
        raise ValueError("attention_mask: (B, T), which tokens are real; concepts make the layers' masks themselves")
    embeds = backbone.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    if backbone.concept_embed_scale != 1.0:
        embeds = embeds * backbone.concept_embed_scale
    cache = past_key_values if isinstance(past_key_values, ConceptCache) else None
    if cache is None and past_key_values is not None and past_key_values.get_seq_length():
        raise ValueError(f"past_key_values: a {type(past_key_values).__name__} cannot hold concepts; leave it out")
    use_cache = not backbone.training and bool(backbone.config.use_cache if use_cache is None else use_cache)
    check_length(backbone, embeds.shape[1] + (cache.seen if cache is not None else 0), "a concept")
    if cache is not None and cache.seen and embeds.shape[1] == 1 and real_at_last(attention_mask):
        return step(backbone, embeds, concepts, cache)
    if cache is None and use_cache:
        cache = ConceptCache()
    return parallel(backbone, embeds, concepts, attention_mask, position_ids, cache)


def real_at_last(attention_mask: torch.Tensor | None) -> bool:
    """Whether the last token is real in every row."""
    return attention_mask is None or bool(attention_mask[:, -1].all())


def parallel(
    backbone: nn.Module,
    embeds: torch.Tensor,
    concepts: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: ConceptCache | None,
) -> ConceptOutput:
    """Whole texts, or several tokens that follow what is in the cache; arguments as of `concept_forward`."""
    config = backbone.concept_config
    caches = (None, None, None) if cache is None else cache.layers
    goes_on = cache is not None and cache.seen > 0
    documents = None
    if attention_mask is None:
        valid = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        if position_ids is not None and not goes_on and (position_ids[:, 1:] == 0).any():
            documents = (position_ids == 0).cumsum(1)
    else:
        valid = attention_mask[:, -embeds.shape[1] :].bool()  # the mask is of what is in the cache too
    past = [valid[:, :0] if layers is None else layers.extend(len(valid), valid.device) for layers in caches]
    if goes_on:
        position_ids = (cache.layers[0].lengths[:, None] + valid.cumsum(1) - 1).clamp(min=0)
    elif position_ids is None:
        position_ids = (valid.cumsum(1) - 1).clamp(min=0)
    position_ids = position_ids.expand_as(valid)

    mask = before(causal_mask(valid, documents), past[0], valid.shape[1])
    shallow = run_layers(backbone, config.parts[0], embeds, mask, position_ids, caches[0])
    memory = None
    if concepts is None:
        texts = Texts(valid, documents)
        memory = known(cache) if goes_on else Memory.empty(len(texts.used), valid.device)
        choice, memory = decide(backbone, shallow, texts, memory)
    else:
        choice = given(backbone, concepts, valid)

    # One slot at least, that training in several processes runs the middle layers in all of them
    order = used_first(choice.concept, least=int(backbone.training))
    kept = choice.concept.gather(1, order)
    middle = run_middle(backbone, choice, order, kept, position_ids, documents, past[1], caches[1])
    since = choice.concept.cumsum(1)
    times = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    slots = Slots(times, valid, choice.concept, since, documents)
    hidden = middle.new_zeros(shallow.shape).scatter(1, across(order, middle), middle * kept[..., None])
    if config.boundary_keeps_token:  # concepts have slots of their own, before those of the tokens
        tokens = Slots(times, valid, torch.zeros_like(valid), since, documents)
        made = slots.take(order)
        slots = Slots(
            *(
                None if a is None else torch.cat([a, b], dim=1)
                for a, b in zip(
                    (made.times, kept, torch.ones_like(kept), made.since, made.documents),
                    (tokens.times, tokens.valid, tokens.concept, tokens.since, tokens.documents),
                )
            )
        )
        own = blend(choice, hidden, shallow)
        first = own.gather(1, across(order, own))
        rest = torch.where(choice.concept[..., None], shallow, own)
        hidden = torch.cat([first, rest], dim=1)
    else:
        hidden = blend(choice, hidden, shallow)
    positions = position_ids.gather(1, slots.times)
    if past[2].shape[1]:  # concepts first, then the tail that they had
        place = torch.arange(past[2].shape[1], device=valid.device).expand_as(past[2])
        nothing = torch.zeros_like(place)
        slots = slots.behind(Slots(place - place.shape[1], past[2], place < caches[1].lengths[:, None], nothing))
    deep = run_deep(backbone, hidden, slots, positions, caches[2])
    if cache is not None:
        tail = (slots.since == since[:, -1:]) & ~slots.concept
        used = torch.cat([past[0], valid], 1), torch.cat([past[1], kept], 1), slots.valid & (slots.concept | tail)
        cache.keep(used, valid.shape[1], memory)
    deep = deep[:, -valid.shape[1] :]
    return ConceptOutput(backbone.norm(deep), past_key_values=cache, shallow=shallow, choice=choice, valid=valid)


def known(cache: ConceptCache) -> Memory:
    """What the segmenter knows of the texts in a cache.

    Raises:
        ValueError: nothing.
    """
    if cache.memory is None:
        raise ValueError("concepts: the text began with given concepts; give those of the next tokens too")
    return cache.memory


def across(order: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Indices (B, n) of slots for tensors (B, S, d)."""
    return order[..., None].expand(-1, -1, like.shape[-1])


def blend(choice: Choice, middle: torch.Tensor, shallow: torch.Tensor) -> torch.Tensor:
    """w c + (1 - w) h (B, T, d): the concept's state c where there is one and else h; with w's gradient, for which c is,
    where there is none, the embedding of what it would be."""
    if choice.weight is None:
        return torch.where(choice.concept[..., None], middle, shallow)
    c = torch.where(choice.concept[..., None], middle, choice.embeds.to(middle.dtype))
    w = choice.weight[..., None].to(middle.dtype)
    return w * c + (1 - w) * shallow


def run_middle(
    backbone: nn.Module,
    choice: Choice,
    order: torch.Tensor,
    kept: torch.Tensor,
    positions: torch.Tensor,
    documents: torch.Tensor | None,
    past: torch.Tensor,
    cache: SlotCache | None,
) -> torch.Tensor:
    """(B, n, d): the middle layers on concepts alone, which stand at `order` (B, n) where `kept` (B, n), behind those of a
    cache, `past` (B, P)."""
    embeds = choice.embeds.gather(1, across(order, choice.embeds))
    if not order.shape[1]:
        return embeds
    documents = None if documents is None else documents.gather(1, order)
    mask = before(causal_mask(kept, documents), past, order.shape[1])
    return run_layers(backbone, backbone.concept_config.parts[1], embeds, mask, positions.gather(1, order), cache)


def run_deep(
    backbone: nn.Module, hidden: torch.Tensor, slots: Slots, positions: torch.Tensor, cache: SlotCache | None
) -> torch.Tensor:
    """(B, S, d): the deep layers on the last S slots in the order in which they stand; those before are in the cache."""
    layers = backbone.concept_config.parts[2]
    if cache is not None or not flex_from(hidden):
        mask = slots.dense_mask(slots.times.shape[1] - hidden.shape[1])
        return run_layers(backbone, layers, hidden, mask, positions, cache)
    # Concepts first: tokens' own blocks are then all that is left to skip, and nearly all of them are
    order = (~slots.concept).to(torch.uint8).argsort(dim=1, stable=True)
    mask = slots.take(order).block_mask()
    out = run_layers(backbone, layers, hidden.gather(1, across(order, hidden)), mask, positions.gather(1, order))
    return torch.empty_like(out).scatter(1, across(order, out), out)


def step(
    backbone: nn.Module, embeds: torch.Tensor, concepts: torch.Tensor | None, cache: ConceptCache
) -> ConceptOutput:
    """One more token (B, 1, d) for every row; arguments as of `concept_forward`."""
    config = backbone.concept_config
    shallow, middle, deep = cache.layers
    everyone = torch.arange(len(embeds), device=embeds.device)
    positions = shallow.lengths[:, None]
    seen = shallow.open(everyone)
    tokens = run_layers(backbone, config.parts[0], embeds, seen, positions, shallow)
    valid = torch.ones(len(embeds), 1, dtype=torch.bool, device=embeds.device)
    if concepts is None:
        choice, cache.memory = decide(backbone, tokens, Texts(valid), known(cache))
    else:
        choice = given(backbone, concepts, valid)
    rows = choice.concept[:, 0].nonzero()[:, 0]
    concepts_before = middle.lengths
    hidden = tokens
    if len(rows):
        seen = middle.open(rows)
        read = run_layers(backbone, config.parts[1], choice.embeds[rows], seen, positions[rows], middle)
        if config.boundary_keeps_token:
            seen = deep.open(rows, concepts_before[rows])
            run_layers(backbone, config.parts[2], read, seen, positions[rows], deep)
        else:
            hidden = tokens.index_copy(0, rows, read.to(tokens.dtype))
    if config.boundary_keeps_token:
        seen = deep.open(everyone)
    else:
        seen = deep.open(everyone, torch.where(choice.concept[:, 0], concepts_before, deep.lengths))
    hidden = run_layers(backbone, config.parts[2], hidden, seen, positions, deep)
    cache.seen += 1
    return ConceptOutput(backbone.norm(hidden), past_key_values=cache, shallow=tokens, choice=choice, valid=valid)
