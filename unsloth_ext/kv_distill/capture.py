"""Keys, values and queries of a forward pass, taken where attention uses them."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..common.attention_tap import attention_tap, check_seen


class _Enough(Exception):
    """Every layer that was asked for has been seen."""


@contextlib.contextmanager
def captured_kvq(
    model: nn.Module, layers: Sequence[int] | None = None, stop: bool = False
) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Collects K, V (B, H_kv, T, D) and Q (B, H_q, T, D) of the first forward inside, with their gradients' graph.

    They are the tensors that SDPA reads, after rotary embedding; no attention map is made.

    Args:
        layers: which to keep; None: all.
        stop: leave the block, without an error, once the last of `layers` has its attention: what comes after it is not
            computed.

    Yields:
        By layer (k, v, q).

    Raises:
        ValueError: the model's attention is not SDPA; at the end, a layer was not seen.
    """
    found: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}
    wanted = None if layers is None else set(layers)

    def observe(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        if wanted is None or layer in wanted:
            found.setdefault(layer, (key, value, query))
        if stop and wanted is not None and wanted <= found.keys():
            raise _Enough

    with contextlib.suppress(_Enough), attention_tap(model, observe):
        yield found
    check_seen(model, found, "taking keys and values", wanted)


def stacked(
    found: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]], layers: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """K, V, Q (B, L, H, T, D) of these layers."""
    k, v, q = (torch.stack([found[layer][i] for layer in layers], dim=1) for i in range(3))
    return k, v, q
