"""The curriculum of Coconut (arXiv 2412.06769) and LOTUS (arXiv 2606.31779): step after step becomes latent.

In stage s the first s steps are replaced by s times c latent tokens. The student writes the other steps, then the answer.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from .data import STEP_ENDS


NEARLY = 1e-6  # of an epoch: what rounding may take from the sum of its steps


@dataclass(frozen=True)
class Stages:
    """When which steps are latent.

    Attributes:
        steps: K, the number of steps that become latent.
        per_step: c, the number of latent tokens of each step.
        iterations: T, as in `LatentConfig`. Stage s has at most s Jacobi iterations.
        epochs: the number of epochs of each stage; the last stage goes on to the end.
        drop_later_steps: whether a stage follows in which steps after the K-th are left out too.
    """

    steps: int
    per_step: int
    iterations: int | None
    epochs: float
    drop_later_steps: bool

    @property
    def last(self) -> int:
        """The last stage."""
        return self.steps + self.drop_later_steps

    def at(self, epoch: float) -> int:
        """The stage after so many epochs, from 1 on."""
        return min(int((epoch + NEARLY) / self.epochs) + 1, self.last)

    def thinking(self, stage: int) -> dict[str, Any]:
        """The fields of `LatentConfig` that a stage changes."""
        latent = min(stage, self.steps)
        iterations = self.iterations and min(latent, self.iterations)
        return {"num_latents": latent * self.per_step, "iterations": iterations}

    def written_from(self, stage: int, step_ends: torch.Tensor, trace_length: torch.Tensor) -> torch.Tensor:
        """The number of tokens of the trace that a stage leaves out.

        Args:
            stage: from 1 on.
            step_ends (B, K'): long, see `LatentCollator`.
            trace_length (B): long.

        Returns:
            (B) long.
        """
        if stage > self.steps or stage > step_ends.shape[1]:
            return trace_length
        return step_ends[:, stage - 1]

    def longest(self, step_ends: list[list[int]], trace_lengths: np.ndarray) -> np.ndarray:
        """The most tokens that latent tokens and written steps of each row have together in a stage: (N) int."""
        most = np.zeros_like(trace_lengths)
        for stage in range(1, self.last + 1):
            reached = np.array([ends[stage - 1] if stage <= len(ends) else -1 for ends in step_ends])
            left = np.where((reached < 0) | (stage > self.steps), 0, trace_lengths - reached)
            most = np.maximum(most, min(stage, self.steps) * self.per_step + left)
        return most


def in_stage(batch: dict[str, torch.Tensor], stages: Stages, stage: int) -> dict[str, torch.Tensor]:
    """A batch whose student writes what a stage leaves of the steps before the answer.

    Args:
        batch: of `LatentCollator`, with `step_ends`.
        stages: the curriculum.
        stage: from 1 on.
    """
    trace_length, eot = batch["trace_mask"].sum(1), batch["input_ids"][:, :1]
    first = stages.written_from(stage, batch[STEP_ENDS], trace_length)
    lengths = batch["teacher_mask"].sum(1) - first
    width = int(lengths.max())
    at = torch.arange(width, device=first.device)
    there = at < lengths[:, None]
    ids = batch["teacher_ids"].gather(1, (first[:, None] + at).clamp(max=batch["teacher_ids"].shape[1] - 1))
    return batch | {
        "input_ids": torch.cat([eot, ids.where(there, batch["teacher_ids"].new_tensor(0))], dim=1),
        "attention_mask": F.pad(there.long(), (1, 0), value=1),
        "labels": F.pad(ids.masked_fill(~there, -100), (1, 0), value=-100),
        "student_at": batch["student_at"] + trace_length - first,
    }
