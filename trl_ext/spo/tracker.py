"""The expected reward of each prompt: a Beta distribution that forgets faster the more the policy moves."""

import torch
from torch import nn


RHO_MODES = ("kl", "constant")


class AutoAdaptiveValueTracker(nn.Module):
    """Beta(a, b) of each prompt's reward in [0, 1], or of all rewards (arXiv 2509.13232, section 3).

        v = a / (a + b)                                     the baseline, before the update
        a <- rho a + r,    b <- rho b + 1 - r
        rho = clip(2^(-D / D_half), rho_min, rho_max)       D: the policy's movement since the last visit

    The tracker starts with N0 = 1 / (1 - rho_min) visits of `initial_value`, and a + b stays between N0 and
    1 / (1 - rho_max).

    Args:
        rho_mode: "kl", or "constant" for rho_const at every visit.
        rho_const: rho if D is unknown, as at a first visit.
        D_half: movement in nats per token at which rho is 1/2 before it is clipped.
        prompts: number of tracked prompts; 1 for a single value.
        rho_min, rho_max: bounds of rho.
        initial_value: expected reward before any visit.

    Attributes:
        a, b: (prompts,), float64.

    Raises:
        ValueError: a value is out of its range.
    """

    def __init__(
        self,
        rho_mode: str = "kl",
        rho_const: float = 0.9,
        D_half: float = 0.06,
        prompts: int = 1,
        rho_min: float = 0.875,
        rho_max: float = 0.96,
        initial_value: float = 0.5,
    ):
        super().__init__()
        if rho_mode not in RHO_MODES:
            raise ValueError(f"rho_mode={rho_mode!r}: choose one of {', '.join(RHO_MODES)}")
        if not 0 <= rho_min <= rho_max < 1:
            raise ValueError(f"rho_min={rho_min}, rho_max={rho_max}: 0 <= rho_min <= rho_max < 1")
        if not 0 <= rho_const < 1:
            raise ValueError(f"rho_const={rho_const}: from 0 to below 1")
        if D_half <= 0:
            raise ValueError(f"D_half={D_half}: must be more than 0 nats per token")
        if not 0 <= initial_value <= 1:
            raise ValueError(f"initial_value={initial_value}: must be an expected reward, from 0 to 1")
        if prompts < 1:
            raise ValueError(f"prompts={prompts}: must be at least 1")
        self.rho_mode, self.rho_const, self.D_half = rho_mode, rho_const, D_half
        self.rho_min, self.rho_max = rho_min, rho_max
        visits = 1 / (1 - rho_min)
        self.register_buffer("a", torch.full((prompts,), visits * initial_value, dtype=torch.float64))
        self.register_buffer("b", torch.full((prompts,), visits * (1 - initial_value), dtype=torch.float64))

    def value(self, rows: torch.Tensor | None = None) -> torch.Tensor:
        """Expected reward, float64, of `rows` (N,) long, or of every prompt (prompts,) if None. The result has shape
        (N,)."""
        a, b = (self.a, self.b) if rows is None else (self.a[rows], self.b[rows])
        return a / (a + b)

    def rho(self, divergence: torch.Tensor) -> torch.Tensor:
        """The decay rho, (N,) float64, for the movement D (N,) float in nats per token; NaN where D is unknown."""
        if self.rho_mode == "constant":
            return torch.full_like(divergence, self.rho_const, dtype=torch.float64)
        kept = torch.exp2(-divergence.double() / self.D_half).clamp(self.rho_min, self.rho_max)
        return kept.nan_to_num(nan=self.rho_const)

    def update(self, rows: torch.Tensor, rewards: torch.Tensor, divergence: torch.Tensor | None = None) -> torch.Tensor:
        """Record one visit of each of `rows`. A row that occurs several times counts as one visit with the mean values.

        Args:
            rows (N,): long.
            rewards (N,): float, in [0, 1]; NaN where unknown, which is no visit.
            divergence (N,): float, D; NaN where unknown; None: unknown everywhere.

        Returns:
            rho of each of `rows`, (N,) float64.

        Raises:
            ValueError: a reward is outside [0, 1].
        """
        check_rewards(rewards)
        divergence = torch.full_like(rewards, torch.nan) if divergence is None else divergence
        visited, place = rows.unique(return_inverse=True)
        rewards, divergence = (_means(x.double(), place, len(visited)) for x in (rewards, divergence))
        rho = self.rho(divergence)
        known = ~rewards.isnan()
        here, kept, rewards = visited[known], rho[known], rewards[known]
        self.a[here] = kept * self.a[here] + rewards
        self.b[here] = kept * self.b[here] + 1 - rewards
        return rho[place]


def check_rewards(rewards: torch.Tensor) -> None:
    """Raise a ValueError that names a reward outside [0, 1]. NaN is allowed."""
    outside = rewards[(rewards < 0) | (rewards > 1)]
    if len(outside):
        raise ValueError(
            f"a reward is {outside[0].item():g}, but SPO tracks success rates: the weighted sum of a completion's "
            "rewards must be from 0 to 1; scale the reward function, or set reward_weights"
        )


def _means(values: torch.Tensor, place: torch.Tensor, groups: int) -> torch.Tensor:
    """The mean of each group over values that are not NaN; NaN for a group without any."""
    known = ~values.isnan()
    sums, counts = values.new_zeros(2, groups)
    sums.index_add_(0, place[known], values[known])
    counts.index_add_(0, place[known], torch.ones_like(values[known]))
    return sums / counts
