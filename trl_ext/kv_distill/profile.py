"""A look at an alignment before any training: shapes, numbers that are not finite, cosines, attention."""

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
    """What one aligner makes of one batch.

    Attributes:
        shapes: by name of tensor (teacher's, student's, as compared).
        not_finite: NaN and infinite numbers among all of these.
        metrics: of `StructuralKVLoss`, with `norm`, and the entropy in nats of both sides' attention rows.
        head_map: (H_out, H_in) of keys; None for a flat aligner.
        attention: of the student's middle layer, first head and first row, (teacher's, student's) (T, T).
    """

    shapes: dict[str, tuple[tuple[int, ...], ...]]
    not_finite: int
    metrics: dict[str, float]
    head_map: torch.Tensor | None
    attention: tuple[torch.Tensor, torch.Tensor]

    def numbers(self) -> dict[str, Any]:
        """What is not a picture."""
        return {"shapes": self.shapes, "not_finite": self.not_finite, **self.metrics}


@torch.no_grad()
def capture_both(
    teacher: PreTrainedModel, student: PreTrainedModel, aligner: MapProjectionAligner, batch: dict[str, torch.Tensor]
) -> tuple[tuple, tuple, torch.Tensor]:
    """K, V, Q of the student's layers and of the teacher's that teach them, and the segments; of one forward of each."""
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
    """What `aligner`, on the CPU, makes of tensors of `capture_both`."""
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
    """A row for each aligner: its head map of keys, and the attention of teacher and student side by side."""
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
