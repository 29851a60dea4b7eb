"""Control of plan lengths: the multipliers of one equality constraint per type."""

import torch
from torch import nn


DAMPING = 10.0


class PlannerQuotaController(nn.Module):
    """Dual ascent on E[length] = target for each type, with an augmented Lagrangian. Ours.

        c_i = (E[length_i] - target_i) / quota_i
        loss_quota = sum_i lambda_i c_i + 10 / 2 c_i^2
        lambda_i <- lambda_i + rate c_i                      after each step, over all its rows

    It is an equality, so lambda may have either sign, and plans that are too short are penalised like plans that are
    too long. E is the mean over rows: one text may have a longer plan if another's is shorter. Without the quadratic
    term dual ascent oscillates between the extremes, because p(<EOS>) saturates. The quota is the hard limit.

    Args:
        targets: target length of each type.
        quotas: quota of each type.
        rate: step size of the multipliers.

    Attributes:
        multipliers: (n,) float64, lambda.
    """

    def __init__(self, targets: list[float], quotas: list[int], rate: float):
        super().__init__()
        self.rate = rate
        self.targets, self.quotas = (torch.tensor(x, dtype=torch.float64) for x in (targets, quotas))
        self.register_buffer("multipliers", torch.zeros_like(self.targets))

    def _violations(self, mean_lengths: torch.Tensor) -> torch.Tensor:
        return (mean_lengths - self.targets.to(mean_lengths)) / self.quotas.to(mean_lengths)

    def loss(self, mean_lengths: torch.Tensor) -> torch.Tensor:
        """The quota loss, a scalar, from the mean E[length] (n,) of a micro-batch, floating point with gradients."""
        c = self._violations(mean_lengths)
        return (self.multipliers.to(c) * c + DAMPING / 2 * c.square()).sum()

    def update(self, mean_lengths: torch.Tensor) -> None:
        """Update the multipliers after a step, from the mean E[length] (n,) of all its rows, floating point."""
        self.multipliers.add_(self.rate * self._violations(mean_lengths.double()))
