"""Distance between the keys, values and attention of a student and a teacher of the same shape (ours)."""

from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


MAP_ELEMENTS = 2**24  # the largest part of an attention map in memory


@dataclass(frozen=True)
class StructuralKVLoss:
    """loss = alpha_k L_K + alpha_v L_V + alpha_attn L_attn + alpha_norm L_norm

    L_K and L_V are 1 - cosine of the vectors of each head and time. L_attn is KL(teacher || student) of the causal
    attention rows softmax(Q K^T / (temperature sqrt(D))). L_norm is half the sum of the squared differences of the log
    norms of keys and of values, because cosines do not see scale. Each is a mean over real times, heads and layers.
    Terms with weight 0 are not computed.

    Attributes:
        alpha_k: the weight of the keys.
        alpha_v: the weight of the values.
        alpha_attn: the weight of the attention.
        temperature: divides the attention logits.
        alpha_norm: the weight of the norms.

    Raises:
        ValueError: a weight is negative, all are 0, or the temperature is not positive.
    """

    alpha_k: float = 1.0
    alpha_v: float = 1.0
    alpha_attn: float = 0.5
    temperature: float = 1.0
    alpha_norm: float = 0.0

    def __post_init__(self) -> None:
        weights = {name: getattr(self, name) for name in ("alpha_k", "alpha_v", "alpha_attn", "alpha_norm")}
        for name, value in weights.items():
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name}={value}: must be 0 (off) or more")
        if not any(weights.values()):
            raise ValueError(f"{', '.join(weights)} are all 0: nothing would be learned")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be more than 0")

    def __call__(
        self,
        s_k: torch.Tensor,
        s_v: torch.Tensor,
        s_q: torch.Tensor | None,
        t_k: torch.Tensor,
        t_v: torch.Tensor,
        t_q: torch.Tensor | None,
        attention_mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Compute the loss and its terms.

        Args:
            s_k, s_v (B, L, H_kv, T, D): floating point, the student's keys and values.
            s_q (B, L, H_q, T, D): floating point, its queries. None if alpha_attn is 0.
            t_k, t_v (B, L, H_kv, T, D): floating point, the teacher's keys and values.
            t_q (B, L, H_q, T, D): floating point, its queries. None if alpha_attn is 0.
            attention_mask (B, T): bool or long, the real times. None means all.

        Returns:
            The loss, a scalar in fp32 or wider, and metrics, scalars without gradients: the terms `k`, `v`, `attn`,
            `norm` that have a weight, and `target_std` and `target_rank` of the teacher's keys (`_k`) and values
            (`_v`).

        Raises:
            ValueError: shapes differ, or queries are missing.
        """
        for name, ours, theirs in (("k", s_k, t_k), ("v", s_v, t_v), ("q", s_q, t_q)):
            if ours is not None and theirs is not None and ours.shape != theirs.shape:
                raise ValueError(f"{name}: {tuple(ours.shape)} of the student, {tuple(theirs.shape)} of the teacher")
        if attention_mask is None:
            attention_mask = torch.ones(s_k.shape[0], s_k.shape[3], device=s_k.device)
        mask = attention_mask.bool()
        terms = {}
        if self.alpha_k:
            terms["k"] = (self.alpha_k, _mean(1 - _cosine(s_k, t_k), mask))
        if self.alpha_v:
            terms["v"] = (self.alpha_v, _mean(1 - _cosine(s_v, t_v), mask))
        if self.alpha_attn:
            if s_q is None or t_q is None:
                raise ValueError("alpha_attn > 0 compares attention: give the queries s_q and t_q, or set alpha_attn=0")
            terms["attn"] = (self.alpha_attn, attention_kl(s_q, s_k, t_q, t_k, mask, self.temperature))
        if self.alpha_norm:
            norms = [_mean((_log_norm(s) - _log_norm(t)) ** 2, mask) for s, t in ((s_k, t_k), (s_v, t_v))]
            terms["norm"] = (self.alpha_norm, sum(norms) / 2)
        metrics = {name: value.detach() for name, (_, value) in terms.items()}
        for name, target in (("k", t_k), ("v", t_v)):
            metrics[f"target_std_{name}"], metrics[f"target_rank_{name}"] = spread(target, mask)
        return sum(weight * value for weight, value in terms.values()), metrics


def create_structural_loss(
    alpha_k: float = 1.0,
    alpha_v: float = 1.0,
    alpha_attn: float = 0.5,
    temperature: float = 1.0,
    alpha_norm: float = 0.0,
) -> StructuralKVLoss:
    """Make a `StructuralKVLoss` with these weights.

    Args:
        alpha_k: the weight of the keys.
        alpha_v: the weight of the values.
        alpha_attn: the weight of the attention.
        temperature: divides the attention logits.
        alpha_norm: the weight of the norms.

    Returns:
        The loss.
    """
    return StructuralKVLoss(alpha_k, alpha_v, alpha_attn, temperature, alpha_norm)


def attention_kl(
    s_q: torch.Tensor, s_k: torch.Tensor, t_q: torch.Tensor, t_k: torch.Tensor, mask: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return the mean KL(teacher || student) of attention rows.

    Rows are processed in chunks, so that a map has at most `MAP_ELEMENTS` elements. If there are several chunks, they
    are recomputed in the backward pass, and only a few maps of that size are in memory at any time.

    Args:
        s_q, t_q (B, L, H_q, T, D): floating point, queries of student and teacher.
        s_k, t_k (B, L, H_kv, T, D): floating point, keys of student and teacher.
        mask (B, T): bool, the real times.
        temperature: divides the attention logits.

    Returns:
        A scalar in fp32 or wider.
    """
    b, layers, heads, times, _ = s_q.shape
    rows = max(1, MAP_ELEMENTS // (b * layers * heads * times))
    given = (s_q, s_k, t_q, t_k, mask, temperature)
    if rows >= times:
        total = _rows_kl(*given, 0, times)
    else:
        total = _wide(s_q.new_zeros(()))
        for start in range(0, times, rows):
            total = total + checkpoint(_rows_kl, *given, start, min(start + rows, times), use_reentrant=False)
    return total / (mask.sum() * layers * heads).clamp(min=1)


def _rows_kl(s_q, s_k, t_q, t_k, mask, temperature, start, stop) -> torch.Tensor:
    ours, theirs = (_log_rows(q, k, mask, temperature, start, stop) for q, k in ((s_q, s_k), (t_q, t_k)))
    allowed = _allowed(mask, start, stop)
    kl = (theirs.exp() * (theirs - ours)).masked_fill(~allowed, 0).sum(-1)
    return (kl * mask[:, None, None, None, start:stop]).sum()


def attention_rows(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the whole causal attention (B, L, H_q, T, T) over real times, for inspection.

    q is (B, L, H_q, T, D) and k is (B, L, H_kv, T, D).
    """
    times = q.shape[3]
    rows = _log_rows(q, k, mask, 1.0, 0, times).exp().masked_fill(~_allowed(mask, 0, times), 0)
    return rows.flatten(2, 3)


def _allowed(mask: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Return which keys a query sees: (B, 1, 1, 1, rows, stop) bool."""
    seen = torch.arange(stop, device=mask.device) <= torch.arange(start, stop, device=mask.device)[:, None]
    return (seen & mask[:, None, :stop])[:, None, None, None]


def _log_rows(q, k, mask, temperature, start, stop) -> torch.Tensor:
    """Return log attention rows (B, L, H_kv, H_q / H_kv, rows, stop)."""
    grouped = _wide(q[:, :, :, start:stop]).unflatten(2, (k.shape[2], -1))
    scores = torch.einsum("blhgtd,blhsd->blhgts", grouped, _wide(k[:, :, :, :stop]))
    scores = scores / (temperature * q.shape[-1] ** 0.5)
    return scores.masked_fill(~_allowed(mask, start, stop), torch.finfo(scores.dtype).min).log_softmax(-1)


@torch.no_grad()
def spread(x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the standard deviation and the effective rank of vectors (B, L, H, T, D) around the mean of their head.

    Both are means over layers. The effective rank is the exponential of the entropy of the normalised eigenvalues of
    the covariance, between 1 and D.
    """
    keep = mask[:, None, None, :, None].float()
    count = mask.sum().clamp(min=1)
    centred = (x.float() - (x.float() * keep).sum((0, 3), keepdim=True) / count) * keep
    covariance = torch.einsum("blhtd,blhte->lde", centred, centred) / (count * x.shape[2])
    std = covariance.diagonal(dim1=1, dim2=2).mean(1).sqrt().mean()
    share = torch.linalg.eigvalsh(covariance.double()).clamp(min=0)
    share = share / share.sum(1, keepdim=True).clamp(min=torch.finfo(share.dtype).tiny)
    return std, torch.special.entr(share).sum(1).exp().mean().float()


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the mean of (B, L, H, T) over real times."""
    keep = mask[:, None, None]
    return values.masked_fill(~keep, 0).sum() / (keep.sum() * values.shape[1] * values.shape[2]).clamp(min=1)


def _cosine(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.cosine_similarity(_wide(x), _wide(y), dim=-1)


def _wide(x: torch.Tensor) -> torch.Tensor:
    """Cast to fp32 unless the dtype is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _log_norm(x: torch.Tensor) -> torch.Tensor:
    return _wide(x).norm(dim=-1).clamp(min=1e-6).log()
