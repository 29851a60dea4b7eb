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
        self._sums: list[torch.Tensor] = []
        self._start = self._projection().detach().clone()

    def _projection(self) -> torch.Tensor:
        weights = dict(self.backbone.thinking_projection.named_parameters())
        trained = [name for name in weights if "modules_to_save" in name]  # PEFT keeps the original beside it
        return weights[trained[0] if trained else "weight"]

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Add up a and sqrt(1 - a^2) over the thinking tokens of every forward in the block, in whatever layout."""
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

    def sums(self) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """Of a and of sqrt(1 - a^2): the sum over the thinking tokens seen and the channels, and how many these are."""
        if not self._sums:
            return {}
        embeds, hidden, count = torch.stack(self._sums).sum(0)
        self._sums.clear()
        return {"thinking/embeds_ratio": (embeds, count), "thinking/hidden_ratio": (hidden, count)}

    def projection_change(self) -> float:
        """Norm of W - W_0 over the norm of W_0."""
        now = self._projection().detach()
        return ((now - self._start.to(now.device)).norm() / self._start.norm().clamp(min=1e-12)).item()


def ratio_deviation(new: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Largest |p_train / p_rollout - 1| over the scored tokens; all (B, C), log-probs. A scalar."""
    return ((new - rollout).exp() - 1).abs().masked_fill(mask == 0, 0).max()  # elsewhere the log-probs may be infinite
