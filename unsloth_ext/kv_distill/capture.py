"""Capture of a forward's keys, values and queries as attention uses them (ours)."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..common.attention_tap import attention_tap, check_seen


class _Enough(Exception):
    """Every requested layer has been seen."""


@contextlib.contextmanager
def captured_kvq(
    model: nn.Module, layers: Sequence[int] | None = None, stop: bool = False
) -> Iterator[dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Collect the keys, values and queries of the first forward inside the context, with the graph of their gradients.

    They are the tensors that SDPA reads, after rotary embedding. No attention map is made.

    Args:
        model: a causal LM with SDPA attention, wrapped by PEFT or not.
        layers: the layers to keep. None means all.
        stop: leave the block, without an error, after the attention of the last of `layers`. The rest is not computed.

    Yields:
        A dictionary from layer to (k, v, q): keys and values (B, H_kv, T, D) and queries (B, H_q, T, D) in the model's
        dtype.

    Raises:
        ValueError: the model's attention is not SDPA; or, at the end, a layer was not seen.
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
    """Stack the tensors of these layers: k, v and q, each (B, L, H, T, D)."""
    k, v, q = (torch.stack([found[layer][i] for layer in layers], dim=1) for i in range(3))
    return k, v, q
