"""Patch that records the log-probs of Unsloth's GRPO loss, which does not return them, at its autograd function."""

import contextlib
import inspect
import types
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch

from .registry import Patch, PatchError, Site, applied


NAME = "grpo_log_probs"
CLASS = "UnslothEfficientGRPO"
_scored: ContextVar[list[torch.Tensor] | None] = ContextVar("scored_log_probs", default=None)


@contextlib.contextmanager
def recording(loss: Callable, scored: list[torch.Tensor]) -> Iterator[None]:
    """Append the log-probs of `loss` (Unsloth's `grpo_accumulated_loss`) to `scored`, while the context is open."""
    token = _scored.set(scored)
    try:
        with applied(NAME, inspect.unwrap(loss).__globals__):
            yield
    finally:
        _scored.reset(token)


def _sites(*owners: Any) -> list[Site]:
    if not owners:
        raise PatchError(f"patch {NAME!r} is for the names of one module: use patches.grpo_log_probs.recording")
    return [(owner, CLASS) for owner in owners]


def _wrap(original: Any) -> Any:
    def apply(log_probs: torch.Tensor, *args: Any) -> Any:
        scored = _scored.get()
        if scored is not None:
            scored.append(log_probs.detach())
        return original.apply(log_probs, *args)

    return types.SimpleNamespace(apply=apply, forward=original.forward)


PATCH = Patch(
    name=NAME,
    package="unsloth_zoo",
    target=f"{CLASS}.apply",
    parameters=("ctx", "_new_logps"),
    signed=lambda owner, attribute: owner[attribute].forward,
    sites=_sites,
    wrap=_wrap,
    places=("unsloth_zoo/rl_replacements.py:UnslothEfficientGRPO",),
    effect="The log-probs that Unsloth's GRPO loss is made from are recorded.",
    reason="HRPO on Unsloth, while the loss is computed: importance ratios are reported",
    upstream="no upstream issue is known",
    removable="when Unsloth's GRPO loss returns its log-probs",
    scoped=True,
)
