"""Selection of the keys and values of a trace that fit a budget (KaVa, arXiv 2510.02312; R-KV, arXiv 2505.24133)."""

from dataclasses import dataclass

import torch

from .scores import kava_importance, kava_redundancy, normalized, rkv_importance, rkv_redundancy


SCORERS = ("kava", "rkv", "attention_only", "cosine_only", "random", "uniform", "crop")
SCORE_NORMS = ("none", "zscore", "rank")


@dataclass(frozen=True)
class KVScoring:
    """Settings for scoring keys.

    Attributes:
        scorer: `"kava"` (arXiv 2510.02312), `"rkv"` (the official code of arXiv 2505.24133), or a control:
            `"attention_only"` and `"cosine_only"` are `kava` with lambda 1 and 0; `"random"`; `"uniform"` (evenly
            spaced); `"crop"` (the first keys).
        mix_lambda: the weight of the importance. The redundancy has weight 1 - `mix_lambda`.
        score_norm: the scale on which the two are mixed: `"none"`, `"zscore"` or `"rank"`. With `"none"` and lambda 0.1
            a `kava` score is mostly attention.
        window: the number of most recent keys that `rkv` always keeps. They are part of the budget.
        kernel_size: the width of the max-pooling of `rkv`, odd.
        retain: which neighbour of a key `rkv` leaves out of the redundancy: `"last"` or `"first"` (see
            `rkv_redundancy`).
        seed: the seed of the `random` scorer. The same call gives the same choice.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    scorer: str = "kava"
    mix_lambda: float = 0.1
    score_norm: str = "none"
    window: int = 8
    kernel_size: int = 7
    retain: str = "last"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, allowed in (("scorer", SCORERS), ("score_norm", SCORE_NORMS), ("retain", ("last", "first"))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if not 0 <= self.mix_lambda <= 1:
            raise ValueError(f"mix_lambda={self.mix_lambda}: must be between 0 and 1")
        if self.window < 1:
            raise ValueError(f"window={self.window}: must be at least 1")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size}: must be odd, so that pooling keeps the length")


@dataclass(frozen=True)
class CompressedKV:
    """The keys and values that were kept, in chronological order.

    A row with fewer real keys than the budget keeps all of them, in front.

    Attributes:
        keys, values (B, Hkv, M, D): in the model's dtype, zero where not valid.
        indices (B, Hkv, M): long, positions in the trace, -1 where not valid.
        valid (B, M): bool.
    """

    keys: torch.Tensor
    values: torch.Tensor
    indices: torch.Tensor
    valid: torch.Tensor


def compress_kv(
    keys: torch.Tensor,
    values: torch.Tensor,
    queries: torch.Tensor,
    budget: int,
    scoring: KVScoring | None = None,
    *,
    key_mask: torch.Tensor | None = None,
    query_mask: torch.Tensor | None = None,
) -> CompressedKV:
    """Keep the `budget` best keys of each sample and KV head.

    Args:
        keys, values (B, Hkv, T, D): floating point, of the trace. Keys are after rotary embedding.
        queries (B, Hq, A, D): in the dtype of `keys`, after rotary embedding. They look back at the trace. Hq is a
            multiple of Hkv. `kava` takes those of the answer; `rkv` uses the last `window` of them.
        budget: M.
        scoring: how keys are scored. None means the defaults.
        key_mask (B, T): bool, the real keys. None means all.
        query_mask (B, A): bool, the real queries. None means all.

    Returns:
        The kept keys and values, M for each head.

    Raises:
        ValueError: the budget leaves no key beside the window of `rkv`, or Hq is no multiple of Hkv.
    """
    scoring = scoring or KVScoring()
    if budget < 1 or (scoring.scorer == "rkv" and budget <= scoring.window):
        least = scoring.window + 1 if scoring.scorer == "rkv" else 1
        raise ValueError(f"budget={budget}: must be at least {least} for the scorer {scoring.scorer!r}")
    if queries.shape[1] % keys.shape[1]:
        raise ValueError(f"{queries.shape[1]} query heads are not a multiple of {keys.shape[1]} KV heads")
    if key_mask is None:
        key_mask = keys.new_ones(keys.shape[0], keys.shape[2], dtype=torch.bool)
    if query_mask is None:
        query_mask = queries.new_ones(queries.shape[0], queries.shape[2], dtype=torch.bool)
    key_mask, query_mask = key_mask.bool(), query_mask.bool()
    if keys.shape[2] == 0:  # an empty trace becomes one key that is not real
        keys, values = (torch.nn.functional.pad(x, (0, 0, 0, 1)) for x in (keys, values))
        key_mask = torch.nn.functional.pad(key_mask, (0, 1))
    scores = score_keys(keys, queries, budget, scoring, key_mask, query_mask)
    return take(keys, values, scores, budget, key_mask)


def score_keys(
    keys: torch.Tensor,
    queries: torch.Tensor,
    budget: int,
    scoring: KVScoring,
    key_mask: torch.Tensor,
    query_mask: torch.Tensor,
) -> torch.Tensor:
    """Return scores (B, Hkv, T) fp32, inf where a key must be kept. Scores of masked keys are arbitrary."""
    shape = keys.shape[:3]
    if scoring.scorer == "rkv":
        return _rkv(keys, queries, budget, scoring, key_mask, query_mask)
    if scoring.scorer == "random":
        return torch.rand(shape, generator=torch.Generator().manual_seed(scoring.seed)).to(keys.device)
    if scoring.scorer in ("uniform", "crop"):
        order = key_mask.long().cumsum(-1) - 1  # the real keys count 0, 1, ...
        count = key_mask.sum(-1, keepdim=True).clamp(min=1)
        spaced = (order + 1) * budget // count > order * budget // count  # true for `budget` keys
        return (-order if scoring.scorer == "crop" else spaced).float()[:, None].expand(shape)
    weight = {"attention_only": 1.0, "cosine_only": 0.0}.get(scoring.scorer, scoring.mix_lambda)
    importance = normalized(kava_importance(queries, keys, key_mask, query_mask), key_mask, scoring.score_norm)
    redundancy = normalized(kava_redundancy(keys, key_mask), key_mask, scoring.score_norm)
    return weight * importance + (1 - weight) * redundancy


def _rkv(keys, queries, budget: int, scoring: KVScoring, key_mask, query_mask) -> torch.Tensor:
    length, window = keys.shape[2], scoring.window
    if length <= window:
        return torch.full(keys.shape[:3], torch.inf, device=keys.device)
    # Move real keys to the right, so that the window is the last columns of every row; the same for queries
    order, asked = (mask.int().argsort(dim=-1, stable=True) for mask in (key_mask, query_mask))
    aligned = keys.gather(2, order[:, None, :, None].expand_as(keys))
    mask = key_mask.gather(1, order)
    outside = mask[:, :-window]
    queries = queries.gather(2, asked[:, None, :, None].expand_as(queries))[:, :, -window:]
    query_mask = query_mask.gather(1, asked)[:, -window:]
    importance = rkv_importance(queries, aligned, mask, query_mask, window, scoring.kernel_size)
    redundancy = rkv_redundancy(aligned, mask, retain=scoring.retain)[..., :-window]
    importance = normalized(importance, outside, scoring.score_norm) * scoring.mix_lambda
    score = importance - normalized(redundancy, outside, scoring.score_norm) * (1 - scoring.mix_lambda)
    # Pooling makes neighbours equal, and topk decides which is kept. As in the official code it gets the real keys only
    best = torch.zeros_like(score, dtype=torch.bool)
    counts = outside.sum(-1)
    for count in counts.unique().tolist():
        rows = counts == count
        top = score[rows, :, score.shape[-1] - count :].topk(min(budget - window, count), dim=-1).indices
        best[rows] = best[rows].scatter(-1, top + score.shape[-1] - count, True)
    score = torch.nn.functional.pad(score.float().masked_fill(best, torch.inf), (0, window), value=torch.inf)
    return torch.empty_like(score).scatter_(-1, order[:, None].expand_as(score), score)


def take(
    keys: torch.Tensor, values: torch.Tensor, scores: torch.Tensor, budget: int, key_mask: torch.Tensor
) -> CompressedKV:
    """Keep the `budget` keys with the highest scores (B, Hkv, T), in chronological order.

    key_mask is (B, T) or (B, Hkv, T) bool.
    """
    length = keys.shape[2]
    key_mask = (key_mask if key_mask.dim() == 3 else key_mask[:, None]).expand_as(scores)
    scores = scores.masked_fill(~key_mask, -torch.inf)
    chosen = scores.argsort(dim=-1, descending=True, stable=True)[..., :budget]  # for equal scores the earliest
    chosen = chosen.masked_fill(~key_mask.gather(-1, chosen), length).sort(-1).values
    chosen = torch.nn.functional.pad(chosen, (0, budget - chosen.shape[-1]), value=length)
    valid = chosen < length
    where = chosen.clamp(max=length - 1)[..., None].expand(*chosen.shape, keys.shape[-1])
    return CompressedKV(
        keys.gather(2, where).masked_fill(~valid[..., None], 0),
        values.gather(2, where).masked_fill(~valid[..., None], 0),
        chosen.masked_fill(~valid, -1),
        valid[:, 0],
    )
