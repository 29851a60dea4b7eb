"""Measurements for the monitors of planner and executor. Ours.

The functions take tensors, run on their device and have no gradients. Results are scalars in float32 or wider; a mean
over nothing is 0. Plans are (B, n, Q) long, with concepts from the front of each type and -1 after its end.
"""

import torch
from torch.nn import functional as F


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def _mean(values: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    values = _wide(values)
    if mask is None:
        return values.sum() / max(values.numel(), 1)
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)  # masked values may be infinite


# -- does the executor use the plan? ------------------------------------------------------------------------------------


def delta_nll(nll_bad: torch.Tensor, nll: torch.Tensor) -> torch.Tensor:
    """Mean of NLL(y | bad plan) - NLL(y | plan) in nats. Near 0, the executor does not use its plan.

    Args:
        nll_bad, nll (N,): float; NLLs of the same texts, or of the same tokens.

    Returns:
        A scalar, float32 or wider.
    """
    return _mean(_wide(nll_bad) - _wide(nll))


def nll_by_bucket(nll: torch.Tensor, mask: torch.Tensor, width: int = 64) -> dict[str, torch.Tensor]:
    """Mean NLL by position: of tokens 0 to `width` - 1, of the next `width`, ...

    It waits for the device once, to leave out empty buckets.

    Args:
        nll (B, T): float, nats.
        mask (B, T): bool; tokens that count. Column t is position t.
        width: number of positions per bucket.

    Returns:
        Scalars, float32 or wider, by bucket: "0-64", "64-128", ...
    """
    mask = mask.bool()
    rest = -nll.shape[1] % width
    sums = F.pad(_wide(nll).masked_fill(~mask, 0), (0, rest)).unflatten(1, (-1, width)).sum((0, 2))
    counts = F.pad(mask, (0, rest)).unflatten(1, (-1, width)).sum((0, 2))
    means = sums / counts.clamp(min=1)
    return {f"{i * width}-{(i + 1) * width}": means[i] for i, count in enumerate(counts.tolist()) if count}


def shuffled(plan: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """Give each text another text's plan, by a random cycle through all rows. The plans may still be equal.

    Args:
        plan (B, n, Q): long.
        generator: of the random numbers.

    Returns:
        (B, n, Q) long.

    Raises:
        ValueError: there is only one row.
    """
    rows = len(plan)
    if rows < 2:
        raise ValueError(f"plan has {rows} rows: at least 2 are needed to exchange plans")
    cycle = torch.randperm(rows, generator=generator, device=_device(plan, generator)).to(plan.device)
    return torch.empty_like(plan).index_copy(0, cycle, plan[cycle.roll(1)])


def random_like(plan: torch.Tensor, sizes: list[int], generator: torch.Generator | None = None) -> torch.Tensor:
    """Random plans of the same lengths, with concepts drawn uniformly from each type's vocabulary.

    Args:
        plan (B, n, Q): long.
        sizes: V_i of the n types.
        generator: of the random numbers.

    Returns:
        (B, n, Q) long.

    Raises:
        ValueError: the number of sizes differs from the number of types.
    """
    if len(sizes) != plan.shape[1]:
        raise ValueError(f"sizes={sizes}: plan has {plan.shape[1]} types")
    shape, device = plan[:, 0].shape, _device(plan, generator)
    drawn = [torch.randint(size, shape, generator=generator, device=device) for size in sizes]
    return torch.where(plan >= 0, torch.stack(drawn, dim=1).to(plan.device), plan)


def commonest_share(plan: torch.Tensor) -> torch.Tensor:
    """Share of the texts that have the most common plan; 1 if all plans (B, n, Q) long are equal. A scalar, float32."""
    counts = plan.flatten(1).unique(dim=0, return_counts=True)[1]
    return _wide(counts.max() / len(plan))


def _device(plan: torch.Tensor, generator: torch.Generator | None) -> torch.device:
    return plan.device if generator is None else generator.device


# -- does the E-step settle? --------------------------------------------------------------------------------------------


def top1_margin(scores: torch.Tensor) -> torch.Tensor:
    """Mean difference in nats between the best and the second candidate's score, over rows with two candidates.

    Args:
        scores (B, K): float; S(z), -inf where there is no candidate.

    Returns:
        A scalar, float32 or wider.

    Raises:
        ValueError: K = 1.
    """
    if scores.shape[1] < 2:
        raise ValueError(f"scores {tuple(scores.shape)}: a margin needs at least 2 candidates")
    best, second = _wide(scores).topk(2, dim=1).values.unbind(1)
    return _mean(best - second, second != -torch.inf)


def flip_rate(old: torch.Tensor, new: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
    """Share of rows whose plan changed.

    Args:
        old, new (B, n, Q): long.
        known (B,): bool; rows that had a plan before; None: all.

    Returns:
        A scalar, float32.
    """
    return _mean((old != new).flatten(1).any(1), known)


def staleness_gap(cached: torch.Tensor, best: torch.Tensor) -> torch.Tensor:
    """Mean of S(best) - S(cached) in nats. It is at least 0 if the cached plan was a candidate.

    Args:
        cached, best (B,): float; both scored with the current model.

    Returns:
        A scalar, float32 or wider.
    """
    return _mean(_wide(best) - _wide(cached))


# -- does the planner learn? --------------------------------------------------------------------------------------------


def entropy_and_max_prob(log_probs: torch.Tensor, open: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean entropy in nats, and mean largest probability, of one type's predictions.

    Args:
        log_probs (B, J, V + 1): float; may be -inf.
        open (B, J): bool; predictions that count.

    Returns:
        Two scalars, float32 or wider.
    """
    probs = _wide(log_probs).exp()
    return _mean(torch.special.entr(probs).sum(-1), open), _mean(probs.amax(-1), open)


def cosine_and_l2(soft: torch.Tensor, hard: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean cosine and mean L2 distance between expected and chosen codeword.

    Args:
        soft, hard (B, n, Q, d): float; expected and chosen codewords.
        mask (B, n, Q): bool; where there is a concept.

    Returns:
        Two scalars, float32 or wider.
    """
    soft, hard = _wide(soft), _wide(hard)
    return _mean(F.cosine_similarity(soft, hard, dim=-1), mask), _mean((soft - hard).norm(dim=-1), mask)


class GradientNorm:
    """L2 norm of the gradient with respect to the tensors that were watched since the last `pop`, taken as one vector.

    Only `pop` waits for the device. Under loss scaling, the norm is that of the scaled gradient.
    """

    def __init__(self):
        self._square: torch.Tensor | float | None = None

    def watch(self, tensor: torch.Tensor) -> None:
        """Watch a tensor (...) of any floating point dtype. Call it before backward, for each micro-batch. Does nothing
        without gradients."""
        if not torch.is_grad_enabled():
            return
        if self._square is None:
            self._square = 0.0
        if tensor.requires_grad:  # a detached tensor gives a norm of 0, as it should
            tensor.register_hook(self._add)

    def _add(self, gradient: torch.Tensor) -> None:
        square = _wide(gradient).square().sum()
        self._square = square if self._square is None else self._square + square

    def pop(self) -> float | None:
        """The norm; 0 if no gradient arrived, None if nothing was watched."""
        square, self._square = self._square, None
        return None if square is None else float(square) ** 0.5
