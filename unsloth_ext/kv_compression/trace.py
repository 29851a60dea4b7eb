"""Collection of a trace's most useful keys and values during a forward (KaVa, arXiv 2510.02312)."""

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
    """Collect each layer's `CompressedKV` of a trace from the forward run inside the context.

    A row without a trace keeps nothing: its `valid` is False.

    Args:
        model: a causal LM with SDPA attention, wrapped by PEFT or not.
        trace_mask (B, S): bool, the keys to choose from (a chain of thought), among all keys including cached ones.
        query_mask (B, T): bool, the tokens of the forward whose queries score the keys (the answer).
        budget: M.
        scoring: how keys are scored. None means the defaults.

    Yields:
        A list that the forward fills, with one entry for each layer.

    Raises:
        ValueError: a row has no query; or, at the end, a layer was not seen.
    """
    trace_mask, query_mask = trace_mask.bool(), query_mask.bool()
    empty = (~query_mask.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"query_mask has no token in row {empty[0]}: no query scores the trace")
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
    """Return the positions of the set entries of each row of (B, T), padded to the longest row, and which are real.
    Both (B, A).
    """
    order = (~mask).int().argsort(dim=-1, stable=True)
    count = mask.sum(-1)
    longest = int(count.max())
    return order[:, :longest], torch.arange(longest, device=mask.device) < count[:, None]
