"""Projections between the heads and widths of two models: by head, and the flat baseline (ours)."""

import torch
from torch import nn


INITS = ("uniform", "uniform_rms", "identity", "random", "procrustes")


class HeadwiseMapProjector(nn.Module):
    """Mix heads, then project the width of each vector: y_s = P_s sum_h M[s, h] x_h. Heads are never flattened to H D.

    Args:
        H_t, H_s: the numbers of input and output heads.
        D_t, D_s: the input and output widths of a head.
        share_dim_proj: one P for all heads, or one for each output head.
        init_uniform: spread heads evenly (rows of M sum to 1), or draw M at random.
        init: instead of `init_uniform`: `"uniform"`; `"uniform_rms"`, with rows of unit length, so that the mean of n
            independent heads is not sqrt(n) times smaller; `"identity"`, one head each; `"random"`; `"procrustes"`, by
            `fit` before the first use.

    Attributes:
        head_map (H_s, H_t): floating point, M.
        dim_map (D_s, D_t): floating point, P, or (H_s, D_s, D_t) if it is not shared.

    Raises:
        ValueError: `init` is unknown.
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
        """Project (B, L, H_t, T, D_t) of any floating dtype to (B, L, H_s, T, D_s) in the dtype of the projector.

        Raises:
            RuntimeError: `init="procrustes"` and `fit` was not called.
        """
        _check_fitted(self.fitted)
        mixed = torch.einsum("sh,blhtd->blstd", self.head_map, x.to(self.head_map.dtype))
        return torch.einsum("blstd,ed->blste" if self.share_dim_proj else "blstd,sed->blste", mixed, self.dim_map)

    @torch.no_grad()
    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """Project (B, L, H_s, T, D_s) back to (B, L, H_t, T, D_t) in the dtype of the projector.

        It uses pseudo-inverses, without gradients.
        """
        width, heads = torch.linalg.pinv(self.dim_map), torch.linalg.pinv(self.head_map)
        narrow = torch.einsum("blste,de->blstd" if self.share_dim_proj else "blste,sde->blstd", y.to(width), width)
        return torch.einsum("hs,blstd->blhtd", heads, narrow)

    @torch.no_grad()
    def fit(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Fit in closed form: P by orthogonal Procrustes from the mixed heads of x to y, then M by least squares.

        Args:
            x (B, L, H_t, T, D_t): floating point, the input.
            y (B, L, H_s, T, D_s): floating point, the target.
            mask (B, T): bool, the times that count. None means all.
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
    """The flat baseline: one linear map from all heads concatenated, H_t D_t, to H_s D_s.

    Args:
        H_t, H_s: the numbers of input and output heads.
        D_t, D_s: the input and output widths of a head.
        init: None draws weights as `nn.Linear` does. `"procrustes"` waits for `fit`.
    """

    def __init__(self, H_t: int, H_s: int, D_t: int, D_s: int, init: str | None = None):
        super().__init__()
        self.heads_in, self.heads_out = H_t, H_s
        self.linear = nn.Linear(H_t * D_t, H_s * D_s, bias=False)
        self.register_buffer("fitted", torch.tensor(init != "procrustes"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Project (B, L, H_t, T, D_t) of any floating dtype to (B, L, H_s, T, D_s) in the dtype of the projector."""
        _check_fitted(self.fitted)
        return _unflat(self.linear(_flat(x).to(self.linear.weight.dtype)), self.heads_out)

    @torch.no_grad()
    def inverse(self, y: torch.Tensor) -> torch.Tensor:
        """Project (B, L, H_s, T, D_s) back to (B, L, H_t, T, D_t) in the dtype of the projector.

        It uses the pseudo-inverse, without gradients.
        """
        weight = self.linear.weight
        return _unflat(_flat(y).to(weight.dtype) @ torch.linalg.pinv(weight).T, self.heads_in)

    @torch.no_grad()
    def fit(self, x: torch.Tensor, y: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        """Fit in closed form, by ridge regression of y on x.

        Args:
            x (B, L, H_t, T, D_t): floating point, the input.
            y (B, L, H_s, T, D_s): floating point, the target.
            mask (B, T): bool, the times that count. None means all.
        """
        x, y = (_flat(z.to(self.linear.weight)) for z in (x, y))
        if mask is not None:
            x, y = (z * mask[:, None, :, None] for z in (x, y))
        self.linear.weight.copy_(_ridge(torch.einsum("blti,bltj->ij", x, x), torch.einsum("blto,blti->oi", y, x)))
        self.fitted.fill_(True)


def _check_fitted(fitted: torch.Tensor) -> None:
    if not fitted:
        raise RuntimeError("init='procrustes': call fit(x, y) on a batch before the projector is used")


def _ridge(gram: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """Solve W gram = cross for W (out, in), with a ridge of 1e-6 times the mean diagonal of the gram matrix."""
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), device=gram.device, dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, cross.T).T


def _flat(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(2, 3).flatten(-2)


def _unflat(x: torch.Tensor, heads: int) -> torch.Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(2, 3)


def _head_map(into: int, out: int, init: str) -> torch.Tensor:
    """Return the initial M (out, into)."""
    if init == "random":
        return torch.randn(out, into) / into**0.5
    if init == "identity":
        return torch.eye(into)[torch.arange(out) * into // out]
    # Each set of heads divides a line into equal parts; a weight is the share of the row's part within the column's
    edge = torch.arange(out + 1, dtype=torch.float64) * into / out
    column = torch.arange(into, dtype=torch.float64)
    overlap = torch.minimum(edge[1:, None], column + 1) - torch.maximum(edge[:-1, None], column)
    rows = overlap.clamp(min=0) * out / into
    if init == "uniform_rms":
        rows = rows / rows.norm(dim=1, keepdim=True)
    return rows.float()


def _dim_map(into: int, out: int) -> torch.Tensor:
    """Return the initial P (out, into): as much of the identity as fits.

    Both halves are treated alike, since rotary embedding pairs dimension i with i + D / 2.
    """
    if into % 2 or out % 2:
        return torch.eye(out, into)
    half = torch.eye(out // 2, into // 2)
    return torch.block_diag(half, half)
