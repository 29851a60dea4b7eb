"""What HRPO logs beside GRPO's metrics."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn


class GateMonitor:
    """Reads the gates while the loss is computed, and how far the projection has moved since the trainer was made."""

    def __init__(self, backbone: nn.Module):
        self.backbone = backbone
        self._log_a: torch.Tensor | None = None
        self._start = self._projection().detach().clone()

    def _projection(self) -> torch.Tensor:
        weights = dict(self.backbone.thinking_projection.named_parameters())
        trained = [name for name in weights if "modules_to_save" in name]  # PEFT keeps the original beside it
        return weights[trained[0] if trained else "weight"]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Keep log a of the last forward in the block."""

        def keep(_: nn.Module, __: tuple, log_a: torch.Tensor) -> None:
            self._log_a = log_a.detach()

        hook = self.backbone.thinking_residual_Lambda.register_forward_hook(keep)
        try:
            yield
        finally:
            hook.remove()

    def means(self, mask: torch.Tensor) -> dict[str, torch.Tensor]:
        """Mean a and mean sqrt(1 - a^2) over the thinking tokens of mask (B, C); NaN when none thinks."""
        log_a, self._log_a = self._log_a, None
        if log_a is None:
            return {}
        weight = mask[..., None].to(log_a.dtype)
        count = weight.sum() * log_a.shape[-1]
        return {
            "thinking/embeds_ratio": (log_a.exp() * weight).sum() / count,
            "thinking/hidden_ratio": ((-torch.expm1(2 * log_a)).sqrt() * weight).sum() / count,
        }

    def projection_change(self) -> float:
        """Norm of W - W_0 over the norm of W_0."""
        now = self._projection().detach()
        return ((now - self._start.to(now.device)).norm() / self._start.norm().clamp(min=1e-12)).item()


def ratio_deviation(new: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Largest |p_train / p_rollout - 1| over the scored tokens; all (B, C), log-probs. A scalar."""
    return ((new - rollout).exp() - 1).abs().mul(mask).max()
