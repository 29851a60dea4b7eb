"""PPO's advantages and value loss per token (arXiv 1506.02438, 1707.06347)."""

from collections.abc import Callable

import torch


def generalized_advantages(
    rewards: torch.Tensor, values: torch.Tensor, mask: torch.Tensor, gamma: float, gae_lambda: float
) -> torch.Tensor:
    """Generalized advantage estimation (arXiv 1506.02438), over the tokens of the mask only.

    A_t = delta_t + gamma lambda A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t. Here t + 1 is the next token of the mask,
    so the text that a tool returns between two tokens of the policy counts as the environment's response to the first.
    The reward is at the last token of the mask, and the value after it is 0.

    Args:
        rewards (B,): floating point; rewards of whole completions.
        values (B, C): floating point; V_t before token t.
        mask (B, C): bool or 0/1; tokens that the policy wrote.
        gamma: discount.
        gae_lambda: lambda.

    Returns:
        (B, C) in the dtype of `values`; 0 outside the mask.
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
    """Mean and variance over all processes of the values where a mask is 1.

    Args:
        values (...): floating point.
        mask (...): 0 or 1.
        total: sums a tensor over processes.

    Returns:
        Two scalars, floating point.
    """
    count = total(mask.sum()).clamp(min=1)
    mean = total((values * mask).sum()) / count
    return mean, total(((values - mean).square() * mask).sum()) / count


def clipped_value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, cliprange: float
) -> torch.Tensor:
    """0.5 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) per token (as in PPO's official code).

    Args:
        values, old_values, returns (...): floating point, of the same shape.
        cliprange: c.

    Returns:
        (...), floating point.
    """
    clipped = torch.clamp(values, old_values - cliprange, old_values + cliprange)
    return 0.5 * torch.maximum((values - returns).square(), (clipped - returns).square())
