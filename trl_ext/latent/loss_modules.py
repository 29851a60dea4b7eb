"""The losses of latent distillation as stand-alone modules. They compute what the trainers compute."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from unsloth_ext.kv_compression.compressor import RKVCompressor
from unsloth_ext.latent.kv_projection import KVProjection
from unsloth_ext.latent.reasoning_module import LatentReasoningModule

from ..common.config_checks import check_weights
from .losses import LOSSES, codi_loss, kv_loss


__all__ = ["CODILoss", "KAVALoss", "KVDistillationLoss", "LatentReasoningModule", "RKVCompressor"]


class CODILoss(nn.Module):
    """Distance between a student's and a teacher's hidden states (CODI, arXiv 2502.21074).

    It equals the trainer's with `codi_loss`, `codi_std_mode="normalize_states"` and `codi_std_scope="token"`.

    Args:
        loss_type: `"l1"`, `"smooth_l1"` or `"mse"`.
        layerwise_std: divide both by the teacher's standard deviation over the last dimension of each vector.
    """

    def __init__(self, loss_type: str = "l1", layerwise_std: bool = True):
        super().__init__()
        self.loss_type, self.layerwise_std = _known(loss_type), layerwise_std

    def forward(self, student_hidden: Any, teacher_hidden: Any) -> torch.Tensor:
        """The mean distance.

        Args:
            student_hidden: (L, B, d) floating point, or a sequence of L tensors (B, d).
            teacher_hidden: as `student_hidden`; no gradient flows into it.

        Returns:
            A scalar, float32.
        """
        return codi_loss(
            _stacked(student_hidden),
            _stacked(teacher_hidden),
            loss=self.loss_type,
            std_mode="normalize_states" if self.layerwise_std else "none",
            std_scope="token",
        )


class KVDistillationLoss(nn.Module):
    """Distance between the keys and values of latent tokens and the ones kept of a teacher's trace (KaVa, arXiv
    2510.02312).

    Keys and values each count half. It equals the trainer's with `kv_loss`, `kv_projection`, `kv_layer_norm` and
    `kv_std_mode="normalize_states"`.

    Args:
        loss_type: `"mse"`, `"l1"` or `"smooth_l1"`.
        layerwise_std: divide both by the teacher's standard deviation in each layer. The student's own standard
            deviation is never used, because the loss would then ignore the student's scale.
        use_projection: apply a linear layer to the student's keys (`k_proj`) and values (`v_proj`). Both start as the
            identity.
        use_layernorm: apply a LayerNorm after each (`k_ln`, `v_ln`).
        head_dim: D. If None, the layers are created at the first call; set it to pass them to an optimizer before that.

    Raises:
        ValueError: `loss_type` is unknown, or `use_layernorm` is set without `use_projection`.
    """

    def __init__(
        self,
        loss_type: str = "mse",
        layerwise_std: bool = True,
        use_projection: bool = True,
        use_layernorm: bool = False,
        head_dim: int | None = None,
    ):
        super().__init__()
        if use_layernorm and not use_projection:
            raise ValueError("use_layernorm=True: the LayerNorm follows the projection; set use_projection=True")
        self.loss_type, self.layerwise_std = _known(loss_type), layerwise_std
        self.use_projection, self.use_layernorm = use_projection, use_layernorm
        self.projection = KVProjection(head_dim, use_layernorm) if use_projection and head_dim else None

    k_proj = property(lambda self: self.projection.keys)
    v_proj = property(lambda self: self.projection.values)
    k_ln = property(lambda self: self.projection.keys_norm)
    v_ln = property(lambda self: self.projection.values_norm)

    def forward(self, student_kv: Any, teacher_kv: Any, valid: torch.Tensor | None = None) -> torch.Tensor:
        """The mean distance (KaVa, arXiv 2510.02312).

        Args:
            student_kv: keys and values, each (L, B, Hkv, M, D) floating point; or a sequence of L pairs (B, Hkv, M, D).
            teacher_kv: as `student_kv`; no gradient flows into it.
            valid (B, M): bool; slots that the teacher's trace fills; None: all.

        Returns:
            A scalar, float32.
        """
        student, teacher = _keys_and_values(student_kv), _keys_and_values(teacher_kv)
        if self.use_projection and self.projection is None:
            self.projection = KVProjection(student[0].shape[-1], self.use_layernorm).to(student[0].device)
        if self.projection is not None:
            student = self.projection(*student)
        if valid is None:
            valid = torch.ones(student[0].shape[1], student[0].shape[3], dtype=torch.bool, device=student[0].device)
        std_mode = "normalize_states" if self.layerwise_std else "none"
        return sum(kv_loss(s, t, valid, loss=self.loss_type, std_mode=std_mode) for s, t in zip(student, teacher)) / 2


class KAVALoss(nn.Module):
    """student_ce + teacher_ce_weight * teacher_ce + alpha1_codi * L_CODI + alpha2_kv * L_KV (KaVa, arXiv 2510.02312).

    It equals the trainer's loss, whose weights are called `w_teacher`, `w_codi` and `w_kv`.

    Args:
        alpha1_codi: weight of L_CODI.
        alpha2_kv: weight of L_KV.
        teacher_ce_weight: weight of the teacher's cross-entropy.
        codi: arguments of `CODILoss`.
        **kv: arguments of `KVDistillationLoss`.
    """

    def __init__(
        self,
        alpha1_codi: float = 10.0,
        alpha2_kv: float = 1.0,
        teacher_ce_weight: float = 1.0,
        codi: dict[str, Any] | None = None,
        **kv: Any,
    ):
        super().__init__()
        check_weights(alpha1_codi=alpha1_codi, alpha2_kv=alpha2_kv, teacher_ce_weight=teacher_ce_weight)
        self.alpha1_codi, self.alpha2_kv, self.teacher_ce_weight = alpha1_codi, alpha2_kv, teacher_ce_weight
        self.codi_loss, self.kv_loss = CODILoss(**(codi or {})), KVDistillationLoss(**kv)

    def forward(
        self,
        student_ce: torch.Tensor,
        teacher_ce: torch.Tensor,
        student_hidden: Any,
        teacher_hidden: Any,
        student_kv: Any,
        teacher_kv: Any,
        valid: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The weighted loss.

        Args:
            student_ce, teacher_ce: scalars, floating point.
            student_hidden, teacher_hidden: (L, B, d), as for `CODILoss`.
            student_kv, teacher_kv: (L, B, Hkv, M, D), as for `KVDistillationLoss`.
            valid (B, M): bool, as for `KVDistillationLoss`.

        Returns:
            The loss, a scalar in floating point, and its terms without weights and gradients: `ce_student`,
            `ce_teacher`, `codi`, `kv`.
        """
        codi = self.codi_loss(student_hidden, teacher_hidden)
        kv = self.kv_loss(student_kv, teacher_kv, valid)
        loss = student_ce + self.teacher_ce_weight * teacher_ce + self.alpha1_codi * codi + self.alpha2_kv * kv
        terms = {"ce_student": student_ce, "ce_teacher": teacher_ce, "codi": codi, "kv": kv}
        return loss, {name: value.detach() for name, value in terms.items()}


def _known(loss_type: str) -> str:
    if loss_type not in LOSSES:
        raise ValueError(f"loss_type={loss_type!r}: choose one of {', '.join(LOSSES)}")
    return loss_type


def _stacked(layers: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    return layers if isinstance(layers, torch.Tensor) else torch.stack(list(layers))


def _keys_and_values(kv: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if len(kv) == 2 and all(isinstance(x, torch.Tensor) and x.dim() == 5 for x in kv):
        return tuple(kv)
    keys, values = zip(*kv, strict=True)
    return torch.stack(keys), torch.stack(values)
