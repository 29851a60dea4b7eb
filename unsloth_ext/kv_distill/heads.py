"""Projections from one model's heads and widths to another's: structured by head, and the flat baseline."""

import torch
from torch import nn


INITS = ("uniform", "uniform_rms", "identity", "random", "procrustes")


class HeadwiseMapProjector(nn.Module):
    """y_s = P_s sum_h M[s, h] x_h: heads are mixed, then each vector's width is projected; never flattened to H D.

    Args:
        H_t, H_s: heads that come in and go out (the teacher's and the student's in the note's direction).
        D_t, D_s: widths of a head.
        share_dim_proj: one P for all heads, or one for each that goes out.
        init_uniform: heads spread evenly (rows of M sum to 1), or at random.
        init: in place of `init_uniform`: `"uniform"`; `"uniform_rms"`, its rows of unit length, so that the mean of n
            unlike heads is not sqrt(n) times smaller; `"identity"`, of each head one; `"random"`; `"procrustes"`, by
            `fit` before the first use.

    Attributes:
        head_map: M (H_s, H_t). dim_map: P (D_s, D_t), or (H_s, D_s, D_t).
    """

    def __init__(
        self,
        H_t: int,
        H_s: int,
        D_t: int,
        D_s: int,
        share_dim_proj: bool = True,
        init_uniform: bool = True,
        init: str | None = None,
    ):
        super().__init__()
        init = init or ("uniform" if init_uniform else "random")
        if init not in INITS:
            raise ValueError(f"init={init!r}: choose one of {', '.join(INITS)}")
        self.share_dim_proj = share_dim_proj
        self.head_map = nn.Parameter(_head_map(H_t, H_s, "uniform_rms" if init == "procrustes" else init))
        width = _dim_map(D_t, D_s)
        self.dim_map = nn.Parameter(width if share_dim_proj else width.repeat(H_s, 1, 1))
        self.register_buffer("fitted", torch.tensor(init != "procrustes"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, H_t, T, D_t) to (B, L, H_s, T, D_s), in the projector's dtype.

        Raises:
            RuntimeError: `init="procrustes"` and `fit` was not called.
        """
        _check_fitted(self.fitted)
        mixed = torch.einsum("sh,blhtd->blstd", self.head_map, x.to(self.head_map.dtype))
        return torch.einsum("blstd,ed->blste" if self.share_dim_proj else "blstd,sed->blste", mixed, self.dim_map)

    @torch.no_grad()
    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """(B, L, H_s, T, D_s) back to (B, L, H_t, T, D_t), by pseudo-inverses and without gradients."""
        width, heads = torch.linalg.pinv(self.dim_map), torch.linalg.pinv(self.head_map)
        narrow = torch.einsum("blste,de->blstd" if self.share_dim_proj else "blste,sde->blstd", y.to(width), width)
        return torch.einsum("hs,blstd->blhtd", heads, narrow)

    @torch.no_grad()
    def fit(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """In closed form: P the orthogonal Procrustes map of the mixed heads of x onto y, then M by least squares.

        Args:
            x (B, L, H_t, T, D_t), y (B, L, H_s, T, D_s); mask (B, T) bool: which times count.
        """
        x, y = x.to(self.head_map), y.to(self.head_map)
        if mask is not None:
            keep = mask[:, None, None, :, None]
            x, y = x * keep, y * keep
        self.fitted.fill_(True)
        mixed = torch.einsum("sh,blhtd->blstd", self.head_map, x)
        cross = torch.einsum("blste,blstd->ed" if self.share_dim_proj else "blste,blstd->sed", y, mixed)
        left, _, right = torch.linalg.svd(cross, full_matrices=False)
        self.dim_map.copy_(left @ right)
        rows = []
        for head, width in enumerate(self.dim_map[None] if self.share_dim_proj else self.dim_map):
            narrow = torch.einsum("blhtd,ed->blhte", x, width)
            target = y if self.share_dim_proj else y[:, :, head : head + 1]
            rows.append(
                _ridge(torch.einsum("blgte,blhte->gh", narrow, narrow), torch.einsum("blste,blhte->sh", target, narrow))
            )
        self.head_map.copy_(torch.cat(rows))


class KVDimensionProjector(nn.Module):
    """The flat baseline: one linear map from all heads side by side, H_t D_t, to H_s D_s.

    Args:
        init: None draws as `nn.Linear` does; `"procrustes"` waits for `fit`.
    """

    def __init__(self, H_t: int, H_s: int, D_t: int, D_s: int, init: str | None = None):
        super().__init__()
        self.heads_in, self.heads_out = H_t, H_s
        self.linear = nn.Linear(H_t * D_t, H_s * D_s, bias=False)
        self.register_buffer("fitted", torch.tensor(init != "procrustes"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, L, H_t, T, D_t) to (B, L, H_s, T, D_s), in the projector's dtype."""
        _check_fitted(self.fitted)
        return _unflat(self.linear(_flat(x).to(self.linear.weight.dtype)), self.heads_out)

    @torch.no_grad()
    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """(B, L, H_s, T, D_s) back, by the pseudo-inverse and without gradients."""
        weight = self.linear.weight
        return _unflat(_flat(y).to(weight.dtype) @ torch.linalg.pinv(weight).T, self.heads_in)

    @torch.no_grad()
    def fit(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """In closed form, by ridge regression of y on x; arguments as of `HeadwiseMapProjector.fit`."""
        x, y = (_flat(z.to(self.linear.weight)) for z in (x, y))
        if mask is not None:
            x, y = (z * mask[:, None, :, None] for z in (x, y))
        self.linear.weight.copy_(_ridge(torch.einsum("blti,bltj->ij", x, x), torch.einsum("blto,blti->oi", y, x)))
        self.fitted.fill_(True)


def _check_fitted(fitted: torch.Tensor) -> None:
    if not fitted:
        raise RuntimeError("init='procrustes': call fit(x, y) on a batch before the projector is used")


def _ridge(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """W (out, in) of the least squares W gram = cross, held down by a millionth of the gram matrix' mean diagonal."""
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, cross.T).T


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(2, 3).flatten(-2)


def _unflat(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(2, 3)


def _head_map(into: int, out: int, init: str) -> torch.Tensor:
    """M (out, into)."""
    if init == "random":
        return torch.randn(out, into) / into**0.5
    if init == "identity":
        return torch.eye(into)[torch.arange(out) * into // out]
    # Both sets of heads divide one line into equal parts; a weight is how much of the row's part lies in the column's
    edge = torch.arange(out + 1, dtype=torch.float64) * into / out
    column = torch.arange(into, dtype=torch.float64)
    overlap = torch.minimum(edge[1:, None], column + 1) - torch.maximum(edge[:-1, None], column)
    rows = overlap.clamp(min=0) * out / into
    if init == "uniform_rms":
        rows = rows / rows.norm(dim=1, keepdim=True)
    return rows.float()


def _dim_map(into: int, out: int) -> torch.Tensor:
    """P (out, into): the identity, or as much of it as there is room for; both halves alike, since rotary embedding pairs
    dimension i with i + D / 2."""
    if into % 2 or out % 2:
        return torch.eye(out, into)
    half = torch.eye(out // 2, into // 2)
    return torch.block_diag(half, half)
