"""`compress_kv`: the keys and values of a trace that fit a budget, chosen for each sample and KV head."""

from dataclasses import dataclass

import torch

from .scores import kava_importance, kava_redundancy, normalized, rkv_importance, rkv_redundancy


SCORERS = ("kava", "rkv", "attention_only", "cosine_only", "random", "uniform", "crop")
SCORE_NORMS = ("none", "zscore", "rank")


@dataclass(frozen=True)
class KVScoring:
    """How keys are ranked.

    Attributes:
        scorer: `"kava"` (arXiv 2510.02312), `"rkv"` (the official code of arXiv 2505.24133), or a control:
            `"attention_only"` and `"cosine_only"` are `kava` with lambda 1 and 0, `"random"`, `"uniform"` (evenly spaced),
            `"crop"` (the first ones: the trace cropped on its right).
        mix_lambda: weight of the importance; the redundancy has the rest.
        score_norm: scale on which the two are mixed: `"none"`, `"zscore"`, `"rank"`. Raw and at lambda 0.1 a `kava` score
            is mostly attention.
        window: most recent keys that `rkv` always keeps; part of the budget.
        kernel_size: width of `rkv`'s max-pooling, odd.
        retain: which neighbour a key lets go of in `rkv`: `"last"` or `"first"` (see `rkv_redundancy`).
        seed: of the `random` scorer; the same call gives the same choice.
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
            raise ValueError(f"mix_lambda={self.mix_lambda}: a weight between 0 and 1")
        if self.window < 1:
            raise ValueError(f"window={self.window}: at least 1")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={self.kernel_size}: an odd number, so that pooling keeps the length")


@dataclass(frozen=True)
class CompressedKV:
    """What was kept, in chronological order; a row with fewer real keys than the budget keeps them all, in front.

    Attributes:
        keys, values (B, Hkv, M, D): zero where not valid.
        indices (B, Hkv, M) long: positions in the trace; -1 where not valid.
        valid (B, M) bool.
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
        keys, values (B, Hkv, T, D): of the trace, keys after rotary embedding.
        queries (B, Hq, A, D): that look back at it, after rotary embedding; Hq a multiple of Hkv. The answer's for `kava`;
            of those for `rkv` the last `window` count.
        budget: M.
        key_mask (B, T), query_mask (B, A) bool: which are real; None means all.

    Raises:
        ValueError: the budget leaves nothing beside `rkv`'s window, or heads do not divide.
    """
    scoring = scoring or KVScoring()
    if budget < 1 or (scoring.scorer == "rkv" and budget <= scoring.window):
        least = scoring.window + 1 if scoring.scorer == "rkv" else 1
        raise ValueError(f"budget={budget}: at least {least} for the scorer {scoring.scorer!r}")
    if queries.shape[1] % keys.shape[1]:
        raise ValueError(f"{queries.shape[1]} query heads are no multiple of {keys.shape[1]} KV heads")
    if key_mask is None:
        key_mask = keys.new_ones(keys.shape[0], keys.shape[2], dtype=torch.bool)
    if query_mask is None:
        query_mask = queries.new_ones(queries.shape[0], queries.shape[2], dtype=torch.bool)
    key_mask, query_mask = key_mask.bool(), query_mask.bool()
    if keys.shape[2] == 0:  # nothing to choose from: one key that is not real
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
    """Scores (B, Hkv, T) fp32; inf where a key must be kept. Those of masked keys mean nothing."""
    shape = keys.shape[:3]
    if scoring.scorer == "rkv":
        return _rkv(keys, queries, budget, scoring, key_mask, query_mask)
    if scoring.scorer == "random":
        return torch.rand(shape, generator=torch.Generator().manual_seed(scoring.seed)).to(keys.device)
    if scoring.scorer in ("uniform", "crop"):
        order = key_mask.long().cumsum(-1) - 1  # 0, 1, ... of the real keys
        count = key_mask.sum(-1, keepdim=True).clamp(min=1)
        spaced = (order + 1) * budget // count > order * budget // count  # true for `budget` of them
        return (-order if scoring.scorer == "crop" else spaced).float()[:, None].expand(shape)
    weight = {"attention_only": 1.0, "cosine_only": 0.0}.get(scoring.scorer, scoring.mix_lambda)
    importance = normalized(kava_importance(queries, keys, key_mask, query_mask), key_mask, scoring.score_norm)
    redundancy = normalized(kava_redundancy(keys, key_mask), key_mask, scoring.score_norm)
    return weight * importance + (1 - weight) * redundancy


def _rkv(keys, queries, budget: int, scoring: KVScoring, key_mask, query_mask) -> torch.Tensor:
    length, window = keys.shape[2], scoring.window
    if length <= window:
        return torch.full(keys.shape[:3], torch.inf, device=keys.device)
    # Real keys to the right, so that the window is the last columns of every row; likewise the queries
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
    # Pooling makes neighbours equal. Which of them the official code keeps is up to topk, on exactly the row's real keys
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
    """The `budget` keys with the highest scores (B, Hkv, T) in key_mask (B, T) or (B, Hkv, T), in chronological order."""
    length = keys.shape[2]
    key_mask = (key_mask if key_mask.dim() == 3 else key_mask[:, None]).expand_as(scores)
    scores = scores.masked_fill(~key_mask, -torch.inf)
    chosen = scores.argsort(dim=-1, descending=True, stable=True)[..., :budget]  # of equal ones the earliest
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
