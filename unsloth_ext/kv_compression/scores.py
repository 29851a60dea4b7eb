"""Scores of cached keys: importance I from attention, redundancy R from cosine similarity. High scores are kept.

| scorer | importance I                        | redundancy R                             | score          |
|--------|-------------------------------------|------------------------------------------|----------------|
| `kava` | softmax over keys, mean over queries | softmax(-mean cosine to the other keys) | l I + (1 - l) R |
| `rkv`  | the same, max-pooled over neighbours | softmax(mean cosine, without one neighbour) | l I - (1 - l) R |

`kava`: arXiv 2510.02312, sec. 3.2. `rkv`: the official code of R-KV (arXiv 2505.24133) at d15c976, whose results these
functions reproduce bit for bit. In both, the logits of a group of query heads are first reduced to their maximum.

Shapes: queries (B, Hq, A, D) after rotary embedding, keys (B, Hkv, T, D), key_mask (B, T) and query_mask (B, A) bool.
All scores are (B, Hkv, T), those of `kava` in fp32. Masked keys and queries may have any value.
"""

import torch
from torch.nn import functional as F


def group_logits(queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Return q k / sqrt(D), the largest of each group of query heads: (B, Hkv, A, T)."""
    batch, heads, count, dim = queries.shape
    grouped = queries.view(batch, keys.shape[1], heads // keys.shape[1], count, dim)
    return (grouped @ keys.unsqueeze(2).transpose(3, 4) / dim**0.5).amax(2)


def kava_importance(
    queries: torch.Tensor, keys: torch.Tensor, key_mask: torch.Tensor, query_mask: torch.Tensor
) -> torch.Tensor:
    """Average the attention of the real queries to each real key. Masked keys get 0."""
    logits = group_logits(queries, keys).float()
    attention = _softmax(logits, key_mask[:, None, None])
    real = query_mask[:, None, :, None]
    return attention.masked_fill(~real, 0).sum(2) / real.sum(2).clamp(min=1)


def kava_redundancy(keys: torch.Tensor, key_mask: torch.Tensor) -> torch.Tensor:
    """Return softmax(-mean cosine to the other real keys).

    It is computed from the sum of the unit keys in O(T D), without a T x T matrix.
    """
    real = key_mask[:, None, :, None]
    unit = torch.where(real, _unit(keys.float()), 0.0)
    total = unit.sum(2, keepdim=True)
    count = key_mask.sum(-1)[:, None, None].clamp(min=1)
    cosine = ((unit * total).sum(-1) - unit.square().sum(-1)) / count
    return _softmax(-cosine, key_mask[:, None])


def rkv_importance(
    queries: torch.Tensor,
    keys: torch.Tensor,
    key_mask: torch.Tensor,
    query_mask: torch.Tensor,
    window: int,
    kernel_size: int,
) -> torch.Tensor:
    """Return (B, Hkv, T - window): `kava_importance` without the last `window` keys, max-pooled over `kernel_size`
    neighbours.

    The result is in the queries' dtype.
    """
    importance = kava_importance(queries, keys[:, :, :-window], key_mask[:, :-window], query_mask).to(queries.dtype)
    return F.max_pool1d(importance, kernel_size, stride=1, padding=kernel_size // 2)


def rkv_redundancy(keys: torch.Tensor, key_mask: torch.Tensor, threshold: float = 0.5, retain: str = "last"):
    """Return the softmax of each key's mean cosine to all keys, leaving out one neighbour above the threshold.

    The result is in the keys' dtype, rounded where the official code rounds. `retain="last"` leaves out the most recent
    neighbour, so that the newest of several equal keys stays. As in the official code, a key without such a neighbour
    leaves out the first key, and `retain="first"` always does.
    """
    unit = torch.where(key_mask[:, None, :, None], _unit(keys), 0.0)
    cosine = unit @ unit.transpose(-1, -2)
    cosine.diagonal(dim1=-2, dim2=-1).zero_()
    position = torch.arange(keys.shape[2], device=keys.device)
    first = key_mask.int().argmax(-1)[:, None, None].expand(cosine.shape[:-1])  # the first real key of each row
    last = torch.where(cosine > threshold, position, first.unsqueeze(-1)).amax(-1)
    left_out = last if retain == "last" else first
    cosine.scatter_(-1, left_out.unsqueeze(-1), 0.0)
    mean = (cosine.float().sum(2) / key_mask.sum(-1)[:, None, None]).to(keys.dtype)
    return _softmax(mean, key_mask[:, None]).to(keys.dtype)


def normalized(scores: torch.Tensor, key_mask: torch.Tensor, how: str) -> torch.Tensor:
    """Put scores (B, Hkv, T) on a common scale, so that the larger range does not decide a mixture.

    `"none"`, `"zscore"` over the real keys, or `"rank"` from 0 for the lowest real key to 1 for the highest.
    """
    real = key_mask[:, None].expand_as(scores)
    count = real.sum(-1, keepdim=True).clamp(min=1)
    if how == "none":
        return scores
    if how == "zscore":
        mean = scores.masked_fill(~real, 0).sum(-1, keepdim=True) / count
        centred = (scores - mean).masked_fill(~real, 0)
        return centred / (centred.square().sum(-1, keepdim=True) / count).sqrt().clamp(min=1e-12)
    if how == "rank":
        rank = scores.masked_fill(~real, float("inf")).argsort(dim=-1, stable=True).argsort(-1)
        return rank / (count - 1).clamp(min=1)
    raise ValueError(f"score_norm={how!r}: choose one of none, zscore, rank")


def _unit(keys: torch.Tensor) -> torch.Tensor:
    return keys / (keys.norm(dim=-1, keepdim=True) + 1e-8)


def _softmax(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the fp32 softmax where the mask is set, and 0 elsewhere and in rows without a set entry."""
    lowest = torch.finfo(logits.dtype).min
    return logits.masked_fill(~mask, lowest).softmax(-1, dtype=torch.float32).masked_fill(~mask, 0.0)
