"""Read the queries, keys and values inside attention, while the model keeps using SDPA.

transformers lets one register attention functions (`AttentionInterface`). Ours calls the SDPA one and then shows the
tensors to an observer. A model uses it while a tap on it is open. No T x T attention map is made.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from typing import Protocol
from weakref import WeakSet

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from .backend import without_block_compile
from .compat import CACHE
from .evaluation_mode import evaluating
from .layer_kinds import numbered
from .wrapping import backbone_of, causal_lm_of


NAME = "sdpa_tapped"
Observer = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None]
_OBSERVER: ContextVar[Observer | None] = ContextVar("attention_observer", default=None)


class _Layer(Protocol):
    keys: torch.Tensor

    def mask(self, length: int, given: torch.Tensor | None) -> torch.Tensor | None: ...
    def observe(self, queries: torch.Tensor) -> None: ...


_EXPECTING: ContextVar[_Layer | None] = ContextVar("cache_layer", default=None)


def expect_attention(layer: _Layer) -> None:
    """Let a cache layer that was just updated give the mask of the next attention over its keys and see its queries."""
    _EXPECTING.set(layer)


def _tapped(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask, **kwargs):
    layer = _EXPECTING.get()
    _EXPECTING.set(None)
    if layer is not None and layer.keys is key:
        attention_mask = layer.mask(query.shape[2], attention_mask)
        out = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        layer.observe(query.detach())
    else:
        out = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    observer = _OBSERVER.get()
    if observer is not None:
        observer(module.layer_idx, query, key, value)
    return out


AttentionInterface.register(NAME, _tapped)
AttentionMaskInterface.register(NAME, sdpa_mask)


def check_sdpa(model: nn.Module) -> None:
    """Raise a ValueError if the model's attention is not SDPA."""
    found = backbone_of(model).config._attn_implementation
    if found not in ("sdpa", NAME):
        raise ValueError(
            f"attn_implementation={found!r}: observing attention works only with 'sdpa'; load the model with "
            "attn_implementation='sdpa'"
        )


@contextlib.contextmanager
def attention_tap(model: nn.Module, observer: Observer) -> Iterator[None]:
    """Show the queries, keys and values of every attention layer to an observer, while the context is open.

    Args:
        model: a causal LM with SDPA attention, wrapped by PEFT or not.
        observer: called as `observer(layer, query, key, value)` in the forward of each layer. The query (B, Hq, T, D)
            and key (B, Hkv, S, D) are after rotary embedding, the value is (B, Hkv, S, D). All are in the model's
            dtype. S counts cached tokens too.

    Raises:
        ValueError: the model's attention is not SDPA.
    """
    check_sdpa(model)
    without_block_compile(model)
    config = backbone_of(model).config
    before = config._attn_implementation
    token = _OBSERVER.set(observer)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _OBSERVER.reset(token)


def check_seen(model: nn.Module, layers: Iterable[int], what: str, wanted: Iterable[int] | None = None) -> None:
    """Raise a ValueError that names the layers that a tap should have seen and did not.

    Args:
        model: the model that was tapped.
        layers: the layers that the tap saw.
        what: the feature that needs them, as the subject of "needs".
        wanted: the layers it should have seen. None means all.
    """
    config = backbone_of(model).config.get_text_config(decoder=True)
    missing = sorted(set(range(config.num_hidden_layers) if wanted is None else wanted) - set(layers))
    if missing:
        raise ValueError(
            f"{type(causal_lm_of(model)).__name__}: no attention is observed in {numbered(missing)}, which does not go "
            f"through transformers' attention functions; {what} needs the keys of every layer: take a model such as llama "
            "or qwen3"
        )


@torch.no_grad()
def check_look(model: nn.Module, what: str) -> None:
    """Check with one forward of two tokens that a tap sees what a cache holds. This runs once for each model.

    The check is skipped if weights are sharded or not in memory. `compressed_trace` and `captured_kvq` then raise an
    error at their first use.

    Args:
        model: a causal LM, wrapped by PEFT or not.
        what: the feature that looks inside attention, as the subject of "needs".

    Raises:
        ValueError: attention is not SDPA; a layer was not seen; or a cache does not hold the keys and values that
            attention reads, as in models that cache something smaller (MLA).
    """
    check_sdpa(model)
    backbone = backbone_of(model)
    if backbone in _LOOKED or any(p.device.type == "meta" or not p.numel() for p in model.parameters()):
        return
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    cache = DynamicCache(config=backbone.config)
    ids = torch.zeros(1, 2, dtype=torch.long, device=backbone.get_input_embeddings().weight.device)
    with evaluating(model), attention_tap(model, lambda layer, _, key, value: seen.update({layer: (key, value)})):
        backbone(input_ids=ids, use_cache=True, **{CACHE: cache})
    check_seen(model, seen, what)
    for layer, held in enumerate(cache.layers):
        ours, theirs = tuple(held.keys.shape), tuple(seen[layer][0].shape)
        if not all(torch.equal(x, y) for x, y in zip((held.keys, held.values), seen[layer], strict=True)):
            raise ValueError(
                f"{type(causal_lm_of(model)).__name__}: in layer {layer} attention does not read the keys and values "
                f"that the cache holds (keys {theirs} for {ours}, as in latent attention, MLA); {what} needs them in the "
                "cache: take a model such as llama or qwen3"
            )
    _LOOKED.add(backbone)


_LOOKED: WeakSet[nn.Module] = WeakSet()
