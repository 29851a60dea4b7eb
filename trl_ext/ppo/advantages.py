"""PPO's arithmetic on token values (arXiv 1506.02438, 1707.06347)."""

from collections.abc import Callable

import torch


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> torch.Tensor:
    """A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t, over the tokens of the mask alone.

    t + 1 is the next token of the mask, so what a tool says between two of the policy's tokens is part of the environment's
    answer to the first. The reward sits on the last token of the mask, and the value after it is 0.

    Args:
        rewards: (B,), of whole completions.
        values: (B, C), V_t before token t.
        mask: (B, C), which tokens are the policy's.

    Returns:
        (B, C), 0 off the mask.
    """
    mask = mask.bool()
    advantages = torch.zeros_like(values)
    reward, next_value, next_advantage = (
        rewards.to(values),
        torch.zeros_like(values[:, 0]),
        torch.zeros_like(values[:, 0]),
    )
    for t in reversed(range(values.shape[1])):
        here, value = mask[:, t], values[:, t]
        advantage = reward + gamma * next_value - value + gamma * gae_lambda * next_advantage
        advantages[:, t] = torch.where(here, advantage, 0)
        next_advantage = torch.where(here, advantage, next_advantage)
        next_value = torch.where(here, value, next_value)
        reward = torch.where(here, 0, reward)
    return advantages


def moments(
    values: torch.Tensor, mask: torch.Tensor, total: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance, each (), of values (...) where mask (...) is 1; `total` sums a tensor over processes."""
    count = total(mask.sum()).clamp(min=1)
    mean = total((values * mask).sum()) / count
    return mean, total(((values - mean).square() * mask).sum()) / count


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> torch.Tensor:
    """0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) of each token. All of one shape."""
    clipped = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
