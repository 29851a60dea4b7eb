"""Diagnostics of an alignment before training: shapes, values that are not finite, cosines, attention."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from unsloth_ext.kv_distill.aligner import NAMES, MapProjectionAligner
from unsloth_ext.kv_distill.capture import captured_kvq, stacked
from unsloth_ext.kv_distill.loss import StructuralKVLoss, attention_rows

from ..cli.report import pyplot_for_files


@dataclass
class AlignmentProfile:
    """Measurements of one aligner on one batch.

    Attributes:
        shapes: by tensor name, the shapes of the teacher's, the student's and the compared tensor.
        not_finite: number of NaN and infinite values in all of these.
        metrics: metrics of `StructuralKVLoss`, the norm term included, and the entropy in nats of both sides' attention
            rows.
        head_map: (H_out, H_in) map of key heads; None for a flat aligner.
        attention: (T, T) attention of the teacher and the student, in the middle layer, first head and first row.
    """

    shapes: dict[str, tuple[tuple[int, ...], ...]]
    not_finite: int
    metrics: dict[str, float]
    head_map: torch.Tensor | None
    attention: tuple[torch.Tensor, torch.Tensor]

    def numbers(self) -> dict[str, Any]:
        """Everything but the tensors."""
        return {"shapes": self.shapes, "not_finite": self.not_finite, **self.metrics}


@torch.no_grad()
def capture_both(
    teacher: PreTrainedModel, student: PreTrainedModel, aligner: MapProjectionAligner, batch: dict[str, torch.Tensor]
) -> tuple[tuple, tuple, torch.Tensor]:
    """Capture K, V, Q of the student's layers and the matching teacher layers in one forward each.

    Args:
        teacher, student: the models.
        aligner: the aligner that names the layers.
        batch: `input_ids`, `attention_mask` and `segment_ids`, (B, T) long.

    Returns:
        K, V, Q of the student, K, V, Q of the teacher (float32, on the CPU), and the segments.
    """
    sides = []
    for model, layers in ((student, range(aligner.student.num_layers)), (teacher, aligner.layers)):
        with captured_kvq(model, layers) as found:
            model(
                input_ids=batch["input_ids"].to(model.device),
                attention_mask=batch["attention_mask"].to(model.device),
                use_cache=False,
            )
        sides.append(tuple(x.float().cpu() for x in stacked(found, layers)))
    return sides[0], sides[1], batch["segment_ids"].cpu()


@torch.no_grad()
def profile_alignment(
    aligner: MapProjectionAligner, student: tuple, teacher: tuple, segments: torch.Tensor
) -> AlignmentProfile:
    """Measure an aligner on captured tensors.

    Args:
        aligner: the aligner, on the CPU.
        student, teacher: K, V, Q of `capture_both`.
        segments (B, T): long.
    """
    ours, theirs, mask = aligner.pairs(student, teacher, segments)
    _, metrics = StructuralKVLoss(alpha_attn=1.0, alpha_norm=1.0)(*ours, *theirs, mask)
    rows = {}
    for name, (k, _, q) in (("teacher", theirs), ("student", ours)):
        rows[name] = attention_rows(q, k, mask)
        entropy = torch.special.entr(rows[name]).sum(-1) * mask[:, None, None]
        metrics[f"entropy_{name}"] = entropy.sum() / (mask.sum() * entropy.shape[1] * entropy.shape[2])
    everything = [*student, *teacher, *ours, *theirs]
    real = int(mask[0].sum())
    middle = (0, ours[0].shape[1] // 2, 0, slice(real), slice(real))
    return AlignmentProfile(
        shapes={n: tuple(tuple(x.shape) for x in xs) for n, *xs in zip(NAMES, teacher, student, ours)},
        not_finite=sum(int((~x.isfinite()).sum()) for x in everything),
        metrics={name: value.item() for name, value in metrics.items()},
        head_map=getattr(aligner.maps["k"], "head_map", None),
        attention=(rows["teacher"][middle], rows["student"][middle]),
    )


def plot_profiles(path: Path, profiles: dict[str, AlignmentProfile], title: str) -> None:
    """Draw one row per aligner: its map of key heads, and the attention of teacher and student."""
    pyplot = pyplot_for_files()
    figure, axes = pyplot.subplots(
        len(profiles), 3, figsize=(13, 4 * len(profiles)), layout="constrained", squeeze=False
    )
    for row, (name, found) in zip(axes, profiles.items(), strict=True):
        if found.head_map is None:
            row[0].axis("off")
            row[0].set_title(f"{name}: no map of heads", loc="left", fontsize=10)
        else:
            most = found.head_map.abs().max().item()
            image = row[0].imshow(found.head_map.detach(), cmap="RdBu_r", vmin=-most, vmax=most)
            figure.colorbar(image, ax=row[0], label="weight")
            out, into = found.head_map.shape
            row[0].set(xlabel="head in", ylabel="head out", xticks=range(into), yticks=range(out))
            row[0].set_title(f"{name}: map of key heads", loc="left", fontsize=10)
        for axis, rows, side in zip(row[1:], found.attention, ("teacher", "student"), strict=True):
            image = axis.imshow(rows, cmap="magma", vmin=0, vmax=1)
            axis.set(xlabel="key", ylabel="query")
            axis.set_title(f"{name}: attention of the {side}", loc="left", fontsize=10)
        figure.colorbar(image, ax=row[2], label="weight")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
