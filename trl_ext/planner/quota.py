"""How long plans should be: the multipliers of one equality constraint for each type."""

import torch
from torch import nn


DAMPING = 10.0


class PlannerQuotaController(nn.Module):
    """Dual ascent on E[length] = target, for each type, by an augmented Lagrangian.

        c_i = (E[length_i] - target_i) / quota_i
        loss_quota = sum_i lambda_i c_i + 10 / 2 c_i^2
        lambda_i <- lambda_i + rate c_i                      after each step, on all its rows

    An equality, so lambda has either sign, and plans that are too short cost as those that are too long. E is the mean over
    rows: a text may have a longer plan where another's is shorter. Without the second part dual ascent swings from one end
    to the other, since p(<EOS>) saturates. The hard cap is the quota itself.

    Attributes:
        multipliers: (n,) lambda.
    """

    def __init__(self, targets: list[float], quotas: list[int], rate: float):
        super().__init__()
        self.rate = rate
        self.targets, self.quotas = (torch.tensor(x, dtype=torch.float64) for x in (targets, quotas))
        self.register_buffer("multipliers", torch.zeros_like(self.targets))

    def _violations(self, mean_lengths: torch.Tensor) -> torch.Tensor:
        return (mean_lengths - self.targets.to(mean_lengths)) / self.quotas.to(mean_lengths)

    def loss(self, mean_lengths: torch.Tensor) -> torch.Tensor:
        """From the mean E[length] (n,) of a micro-batch, with gradients."""
        c = self._violations(mean_lengths)
        return (self.multipliers.to(c) * c + DAMPING / 2 * c.square()).sum()

    def update(self, mean_lengths: torch.Tensor) -> None:
        """After a step, with the mean E[length] (n,) of all its rows."""
        self.multipliers.add_(self.rate * self._violations(mean_lengths.double()))
