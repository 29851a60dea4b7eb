"""The losses of latent distillation: `w_student CE + w_teacher CE + w_codi L_CODI + w_kv L_KV`.

L_CODI (arXiv 2502.21074; PCCoT uses it too) pulls the student's hidden state at the token that predicts the first answer
token towards the teacher's, in every layer. L_KV (KaVa, arXiv 2510.02312) pulls the keys and values of the latent tokens
towards those kept of the teacher's trace.

Means and standard deviations are over the batch of all processes: `all_sum` adds a tensor up over them. Each function
returns what, averaged over the processes (as DDP averages gradients), is the loss of the whole batch.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F


LOSSES = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss, "mse": F.mse_loss}
STD_MODES = ("divide_loss", "normalize_states", "none")
STD_SCOPES = ("layer", "global", "token")
AllSum = Callable[[torch.Tensor], torch.Tensor]


def alone(x: torch.Tensor) -> torch.Tensor:
    """`all_sum` of a single process."""
    return x


def masked_mean(values: torch.Tensor, mask: torch.Tensor, all_sum: AllSum = alone) -> torch.Tensor:
    """Mean of `values` where the mask (broadcastable) is set, over all processes."""
    mask = mask.expand_as(values)
    processes, count = all_sum(torch.stack([mask.new_ones((), dtype=torch.float32), mask.sum().float()]))
    return torch.where(mask, values, 0.0).sum() * processes / count.clamp(min=1)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, all_sum: AllSum = alone) -> torch.Tensor:
    """Mean next-token cross-entropy; logits (B, T, V), labels (B, T) with -100 where nothing is asked."""
    targets = labels[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return masked_mean(loss, targets != -100, all_sum)


def std_of(values: torch.Tensor, mask: torch.Tensor, all_sum: AllSum = alone) -> torch.Tensor:
    """Unbiased standard deviation of what the mask (broadcastable) selects, over all processes; a scalar, no gradient."""
    values, mask = values.detach().double(), mask.expand_as(values)
    count, total = all_sum(torch.stack([mask.sum().double(), torch.where(mask, values, 0.0).sum()]))
    mean = total / count.clamp(min=1)
    square = all_sum(torch.where(mask, values - mean, 0.0).square().sum())
    return (square / (count - 1).clamp(min=1)).sqrt().clamp(min=1e-12)


def codi_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    loss: str = "smooth_l1",
    std_mode: str = "divide_loss",
    std_scope: str = "layer",
    all_sum: AllSum = alone,
) -> torch.Tensor:
    """Distance of hidden states.

    Args:
        student, teacher (L, B, d): one token a row, from every layer that counts; no gradient into the teacher.
        std_mode: `"divide_loss"` by the teacher's standard deviation (twice for `"mse"`, whose unit is squared),
            `"normalize_states"` of both by it, or `"none"`.
        std_scope: over `"layer"`, `"global"` over all layers, or of each `"token"` (one row in one layer).
    """
    _check_shapes(student, teacher)
    teacher = teacher.detach()
    everything = torch.ones((), dtype=torch.bool, device=teacher.device)
    if std_mode == "none":
        std = 1.0
    elif std_scope == "token":
        std = teacher.float().std(dim=-1, keepdim=True).clamp(min=1e-12)
    elif std_scope == "global":
        std = std_of(teacher, everything, all_sum).float()
    else:
        std = torch.stack([std_of(layer, everything, all_sum) for layer in teacher]).float()[:, None, None]
    return masked_mean(_distance(student, teacher, loss, std_mode, std, squared=True), everything, all_sum)


def kv_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    valid: torch.Tensor,
    *,
    loss: str = "smooth_l1",
    std_mode: str = "none",
    all_sum: AllSum = alone,
) -> torch.Tensor:
    """Distance of the latent tokens' keys (or values) to those kept of the teacher's trace; take both and average.

    Args:
        student, teacher (L, B, Hkv, M, D); no gradient into the teacher.
        valid (B, M), or anything broadcastable to (L, B, Hkv, M), bool: slots that the teacher's trace fills.
        std_mode: `"none"`, or the teacher's standard deviation by layer over the valid slots: `"divide_loss"` by it, or
            `"normalize_states"` of both by it. Never the student's own: that is blind to scale.
    """
    _check_shapes(student, teacher)
    teacher = teacher.detach()
    if valid.dim() == 2:
        valid = valid[None, :, None]
    mask = valid[..., None].expand_as(teacher)
    std = 1.0
    if std_mode != "none":
        layers = [std_of(t, m, all_sum) for t, m in zip(teacher, mask, strict=True)]
        std = torch.stack(layers).float()[:, None, None, None, None]
    return masked_mean(_distance(student, teacher, loss, std_mode, std), mask, all_sum)


def _check_shapes(student: torch.Tensor, teacher: torch.Tensor) -> None:
    if student.shape != teacher.shape:  # torch would repeat the smaller one
        raise ValueError(
            f"the student's {tuple(student.shape)} and the teacher's {tuple(teacher.shape)} need one shape: the same "
            "layers, rows, heads and positions"
        )


def _distance(student, teacher, loss, std_mode, std, squared=False) -> torch.Tensor:
    student, teacher = student.float(), teacher.float()
    if std_mode == "normalize_states":
        return LOSSES[loss](student / std, teacher / std, reduction="none")
    return LOSSES[loss](student, teacher, reduction="none") / (std**2 if squared and loss == "mse" else std)
