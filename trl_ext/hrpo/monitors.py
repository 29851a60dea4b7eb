"""Metrics of HRPO: gates, movement and gradient of the projection, and the importance ratio."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import TrainerCallback, TrainerState

from unsloth_ext.common.sharding import full
from unsloth_ext.common.wrapping import backbone_of


class GateMonitor:
    """Measure the gates during the loss, and how far the projection has moved since the trainer was constructed."""

    def __init__(self, backbone: nn.Module):
        self.backbone = backbone
        self._log_a: torch.Tensor | None = None
        self._sums: list[torch.Tensor] = []
        self._start = projection_weight(backbone).detach().clone()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Sum a and sqrt(1 - a^2) over the thinking tokens of every forward in the block, for any batch layout."""
        self._sums.clear()

        def keep(_: nn.Module, __: tuple, log_a: torch.Tensor) -> None:
            self._log_a = log_a.detach()

        def add(_: nn.Module, __: tuple, kwargs: dict, ___: object) -> None:
            log_a, self._log_a = self._log_a, None
            if log_a is None:
                return
            weight = kwargs["thinking_mask"][..., None].to(log_a.dtype)
            a, b = log_a.exp(), (-torch.expm1(2 * log_a)).sqrt()
            self._sums.append(torch.stack([(a * weight).sum(), (b * weight).sum(), weight.sum() * log_a.shape[-1]]))

        hooks = (
            self.backbone.thinking_residual_Lambda.register_forward_hook(keep),
            self.backbone.register_forward_hook(add, with_kwargs=True),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def means(self) -> dict[str, torch.Tensor]:
        """Mean a and mean sqrt(1 - a^2) over the thinking tokens seen; NaN if there were none.

        Means are needed instead of sums, because Unsloth runs some micro-batches twice.
        """
        if not self._sums:
            return {}
        embeds, hidden, count = torch.stack(self._sums).sum(0)
        self._sums.clear()
        return {"thinking/embeds_ratio": embeds / count, "thinking/hidden_ratio": hidden / count}

    def projection_change(self) -> dict[str, float]:
        """The distance of W from W_0, the weight at construction: relative norm of W - W_0, and mean |W - W_0|."""
        now = full(projection_weight(self.backbone)).detach()
        relative = (now - self._start.to(now.device)).norm() / self._start.norm().clamp(min=1e-12)
        return {
            "thinking/projection_change": relative.item(),
            "thinking/projection_mean_change": mean_change(now, self._start),
        }


class ThinkingProjectionMonitor(TrainerCallback):
    """Print how far the thinking projection has moved, and the norm of its gradient.

    The first number is the mean absolute change of its weight since training began, and should grow from 0. The second
    is the norm after clipping by `max_grad_norm`, and should not be 0. `HRPOTrainer` logs the first as
    `thinking/projection_mean_change`, and the norm before clipping as `thinking/projection_grad_norm`. Ours.

    Args:
        every: number of steps between two lines.

    Raises:
        ValueError: `every` is below 1.
    """

    def __init__(self, every: int = 10):
        if every < 1:
            raise ValueError(f"every={every}: must be at least 1")
        self.every = every
        self._start: torch.Tensor | None = None
        self._norm: float | None = None

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **_: Any) -> None:
        self._start = full(projection_weight(backbone_of(model)).detach()).clone()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **_: Any) -> None:
        if (state.global_step + 1) % self.every == 0:  # the gradient is cleared at the end of the step
            gradient = projection_weight(backbone_of(model)).grad
            self._norm = None if gradient is None else full(gradient).norm().item()

    def on_step_end(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **_: Any) -> None:
        if state.global_step % self.every:
            return
        now = full(projection_weight(backbone_of(model)).detach())  # on all processes
        if not state.is_world_process_zero:
            return
        change = mean_change(now, self._start)
        norm = "No gradient!" if self._norm is None else f"gradient norm {self._norm:.3e}"
        tqdm.write(f"step {state.global_step}: thinking_projection: mean change {change:.3e}, {norm}")


def projection_weight(backbone: nn.Module) -> torch.Tensor:
    """The trainable weight (d, d) of the thinking projection. Under PEFT this is the adapter's copy, not the original."""
    weights = dict(backbone.thinking_projection.named_parameters())
    trained = [name for name in weights if "modules_to_save" in name]
    return weights[trained[0] if trained else "weight"]


def mean_change(now: torch.Tensor, start: torch.Tensor) -> float:
    """Mean absolute difference of two tensors of the same shape."""
    return (now - start.to(now.device)).abs().mean().item()


def ratio_deviation(new: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Largest |p_train / p_rollout - 1| over the scored tokens.

    Args:
        new (B, C): float; log-probabilities of the training forward.
        rollout (B, C): float; log-probabilities of the rollout.
        mask (B, C): 0 where a token is not scored.

    Returns:
        A scalar in the dtype of `new`.
    """
    return ((new - rollout).exp() - 1).abs().masked_fill(mask == 0, 0).max()  # unscored log-probs may be infinite


def log_ratio(new: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Largest |log p_train - log p_rollout| over the soft tokens. Both p may be too large or small to compare.

    Args:
        new (B, C): float; log-likelihoods of the training forward.
        rollout (B, C): float; log-likelihoods of the rollout.
        mask (B, C): bool, the scored soft tokens.

    Returns:
        A scalar in the dtype of `new`.
    """
    return (new - rollout).abs().masked_fill(~mask, 0).max()
