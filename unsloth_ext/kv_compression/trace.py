"""The keys and values of a trace that are worth keeping, taken from one forward."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from ..common.attention_tap import attention_tap, check_seen
from .compression import CompressedKV, KVScoring, compress_kv


@contextlib.contextmanager
def compressed_trace(
    model: nn.Module,
    trace_mask: torch.Tensor,
    query_mask: torch.Tensor,
    budget: int,
    scoring: KVScoring | None = None,
) -> Iterator[list[CompressedKV]]:
    """Collects, from the one forward run inside, each layer's `CompressedKV` of a trace.

    Args:
        trace_mask (B, S) bool: of all keys, cached ones too, those to choose from (a chain of thought).
        query_mask (B, T) bool: of the forward's tokens those whose queries judge them (the answer).
        budget: M.

    Yields:
        A list that the forward fills, one entry a layer.

    A row without a trace keeps nothing (`valid` is False).

    Raises:
        ValueError: a row has no query; at the end, a layer was not seen.
    """
    trace_mask, query_mask = trace_mask.bool(), query_mask.bool()
    empty = (~query_mask.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"query_mask has no token in row {empty[0]}: nothing looks back at the trace")
    columns = trace_mask.any(0).nonzero().flatten().tolist() or [0]
    span = slice(columns[0], columns[-1] + 1)
    real = trace_mask[:, span]
    rows, asked = _gather_index(query_mask)
    layers: list[CompressedKV] = []

    @torch.no_grad()
    def observe(layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        assert layer == len(layers), "one forward a tap"
        where = rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[-1])
        answer = query.gather(2, where)
        layers.append(
            compress_kv(key[:, :, span], value[:, :, span], answer, budget, scoring, key_mask=real, query_mask=asked)
        )

    with attention_tap(model, observe):
        yield layers
    check_seen(model, range(len(layers)), "choosing keys and values of a trace")


def _gather_index(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions of the set entries of each row of (B, T), padded to the longest row: (B, A) and which of them are real."""
    order = (~mask).int().argsort(dim=-1, stable=True)
    count = mask.sum(-1)
    longest = int(count.max())
    return order[:, :longest], torch.arange(longest, device=mask.device) < count[:, None]
