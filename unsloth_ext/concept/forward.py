"""The forward of a model with concepts (ours).

Whole texts are computed in parallel, with the result of decoding token by token. Slot t of the deep layers holds
middle(concept_t) if token t became a concept, else its shallow state. Logits of position t are read at slot t, which
also covers a tail that has just become empty. Rotary positions are those of the text.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask
from transformers.modeling_outputs import BaseModelOutputWithPast

from ..common.compat import CACHE
from ..common.layer_kinds import check_length
from .cache import ConceptCache, SlotCache, used_first
from .flex_attention import FLEX, flex_from
from .gate import Choice, decide, given
from .masks import Slots, before, causal_mask
from .packing import Texts
from .segmenters import Memory


@dataclass
class ConceptOutput(BaseModelOutputWithPast):
    """The output of the decoder, with fields for concepts.

    Attributes:
        shallow (B, T, d): in the model's dtype, the input of the head.
        choice: which tokens became which concepts.
        valid (B, T): bool, real tokens.
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
    """Run decoder layers.

    Args:
        backbone: the decoder.
        layers: the indices of the layers.
        hidden (B, T, d): in the model's dtype.
        mask (B, 1, T, S): bool, or a `BlockMask`, or None for causal attention.
        positions (B, T): long, rotary positions.
        cache: the cache of the layers.

    Returns:
        (B, T, d) in the same dtype.
    """
    rotary = backbone.rotary_emb(hidden, position_ids=positions)
    with attention(backbone, FLEX) if isinstance(mask, BlockMask) else contextlib.nullcontext():
        for i in layers:
            hidden = backbone.layers[i](
                hidden,
                attention_mask=mask,
                position_ids=positions,
                position_embeddings=rotary,
                use_cache=cache is not None,
                **{CACHE: cache},
            )
    return hidden


@contextlib.contextmanager
def attention(backbone: nn.Module, name: str) -> Iterator[None]:
    """Use another attention function inside the context."""
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
    cache: Any = None,
    **_: Any,
) -> ConceptOutput:
    """Run the decoder with concepts, in place of the forward of its class.

    Args:
        backbone: the decoder with the concept modules.
        input_ids (B, T): long. None with `inputs_embeds`.
        attention_mask (B, T): long or bool, real tokens, padded on either side; (B, S) if it also covers those in the
            cache. None means that every token is real.
        position_ids (B, T): long. None counts the real tokens. Without a mask, every 0 begins another text of a packed
            row.
        past_key_values: a `ConceptCache` to continue from. None, or another cache that is empty, starts a new one.
        inputs_embeds (B, T, d): in the model's dtype. None with `input_ids`.
        use_cache: as in transformers.
        concepts (B, T): long, the concept of each token or `<NULL>`, instead of the head's decision. (B, T, C) for
            several codebooks.
        cache: `past_key_values` under its name since transformers 5.24.

    Returns:
        The output, with hidden states (B, T, d) in the model's dtype.

    Raises:
        ValueError: not exactly one of ids and embeddings is given; the mask is not (B, T); or another kind of cache has
            tokens.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if attention_mask is not None and (isinstance(attention_mask, dict) or attention_mask.dim() != 2):
        raise ValueError("attention_mask: must be (B, T), the real tokens; concepts make the layers' masks themselves")
    embeds = backbone.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
    if backbone.concept_embed_scale != 1.0:
        embeds = embeds * backbone.concept_embed_scale
    given = past_key_values if cache is None else cache
    cache = given if isinstance(given, ConceptCache) else None
    if cache is None and given is not None and given.get_seq_length():
        raise ValueError(f"{CACHE}: a {type(given).__name__} cannot hold concepts; leave it out")
    use_cache = not backbone.training and bool(backbone.config.use_cache if use_cache is None else use_cache)
    check_length(backbone, embeds.shape[1] + (cache.seen if cache is not None else 0), "a concept")
    if cache is not None and cache.seen and embeds.shape[1] == 1 and real_at_last(attention_mask):
        return step(backbone, embeds, concepts, cache)
    if cache is None and use_cache:
        cache = ConceptCache()
    return parallel(backbone, embeds, concepts, attention_mask, position_ids, cache)


def real_at_last(attention_mask: torch.Tensor | None) -> bool:
    """Return whether the last token is real in every row."""
    return attention_mask is None or bool(attention_mask[:, -1].all())


def parallel(
    backbone: nn.Module,
    embeds: torch.Tensor,
    concepts: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: ConceptCache | None,
) -> ConceptOutput:
    """Process whole texts, or several tokens after those in the cache. The arguments are those of `concept_forward`."""
    config = backbone.concept_config
    caches = (None, None, None) if cache is None else cache.layers
    goes_on = cache is not None and cache.seen > 0
    documents = None
    if attention_mask is None:
        valid = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        if position_ids is not None and not goes_on and (position_ids[:, 1:] == 0).any():
            documents = (position_ids == 0).cumsum(1)
    else:
        valid = attention_mask[:, -embeds.shape[1] :].bool()  # the mask also covers the tokens in the cache
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

    # At least one slot, so that in distributed training every process runs the middle layers
    order = used_first(choice.concept, least=int(backbone.training))
    kept = choice.concept.gather(1, order)
    middle = run_middle(backbone, choice, order, kept, position_ids, documents, past[1], caches[1])
    since = choice.concept.cumsum(1)
    times = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
    slots = Slots(times, valid, choice.concept, since, documents)
    hidden = middle.new_zeros(shallow.shape).scatter(1, across(order, middle), middle * kept[..., None])
    if config.boundary_keeps_token:  # concepts have separate slots, before those of the tokens
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
    if past[2].shape[1]:  # the cache holds concepts first, then their tail
        place = torch.arange(past[2].shape[1], device=valid.device).expand_as(past[2])
        nothing = torch.zeros_like(place)
        slots = slots.behind(Slots(place - place.shape[1], past[2], place < caches[1].lengths[:, None], nothing))
    deep = run_deep(backbone, hidden, slots, positions, caches[2])
    if cache is not None:
        tail = (slots.since == since[:, -1:]) & ~slots.concept
        used = torch.cat([past[0], valid], 1), torch.cat([past[1], kept], 1), slots.valid & (slots.concept | tail)
        cache.keep(used, valid.shape[1], memory)
    deep = deep[:, -valid.shape[1] :]
    return ConceptOutput(backbone.norm(deep), shallow=shallow, choice=choice, valid=valid, **{CACHE: cache})


def known(cache: ConceptCache) -> Memory:
    """Return the segmenter's state for the texts in a cache.

    Raises:
        ValueError: there is none, because concepts were given.
    """
    if cache.memory is None:
        raise ValueError("concepts: the text began with given concepts; give those of the next tokens too")
    return cache.memory


def across(order: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Expand indices (B, n) of slots for tensors (B, S, d)."""
    return order[..., None].expand(-1, -1, like.shape[-1])


def blend(choice: Choice, middle: torch.Tensor, shallow: torch.Tensor) -> torch.Tensor:
    """Return w c + (1 - w) h (B, T, d), where c is the state of a concept and h that of a token.

    The value is c where there is a concept, else h. w has the gradient of the probability. For this gradient, c is also
    defined at other tokens: it is the embedding of the concept that the token would become.
    """
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
    """Run the middle layers on concepts alone: (B, n, d).

    The concepts are at `order` (B, n) where `kept` (B, n) is set. Those of a cache, `past` (B, P), come before them.
    """
    embeds = choice.embeds.gather(1, across(order, choice.embeds))
    if not order.shape[1]:
        return embeds
    documents = None if documents is None else documents.gather(1, order)
    mask = before(causal_mask(kept, documents), past, order.shape[1])
    return run_layers(backbone, backbone.concept_config.parts[1], embeds, mask, positions.gather(1, order), cache)


def run_deep(
    backbone: nn.Module, hidden: torch.Tensor, slots: Slots, positions: torch.Tensor, cache: SlotCache | None
) -> torch.Tensor:
    """Run the deep layers on the last S slots, in their order: (B, S, d). Earlier slots are in the cache."""
    layers = backbone.concept_config.parts[2]
    if cache is not None or not flex_from(hidden):
        mask = slots.dense_mask(slots.times.shape[1] - hidden.shape[1])
        return run_layers(backbone, layers, hidden, mask, positions, cache)
    # With concepts first, nearly all blocks of tokens can be skipped: a token sees only the tail among them
    order = (~slots.concept).to(torch.uint8).argsort(dim=1, stable=True)
    mask = slots.take(order).block_mask()
    out = run_layers(backbone, layers, hidden.gather(1, across(order, hidden)), mask, positions.gather(1, order))
    return torch.empty_like(out).scatter(1, across(order, out), out)


def step(
    backbone: nn.Module, embeds: torch.Tensor, concepts: torch.Tensor | None, cache: ConceptCache
) -> ConceptOutput:
    """Process one more token (B, 1, d) of every row. The arguments are those of `concept_forward`."""
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
    return ConceptOutput(backbone.norm(hidden), shallow=tokens, choice=choice, valid=valid, **{CACHE: cache})
