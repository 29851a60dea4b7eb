"""Rollouts of TRL's GRPO that are written by another function than the model's own `generate`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from unsloth_ext.common.sharding import whole_weights


@contextlib.contextmanager
def generating_by(model: nn.Module, generate: Callable[..., Any]) -> Iterator[None]:
    """Let `model.generate` be another function inside the context. An own one of the instance, as Unsloth sets it, comes
    back."""
    own = vars(model).get("generate")
    model.generate = generate
    try:
        yield
    finally:
        if own is None:
            del model.generate
        else:
            model.generate = own


@contextlib.contextmanager
def rollouts_by(trainer: Any, model: nn.Module, generate: Callable[..., Any]) -> Iterator[None]:
    """While the parent's generation code runs: only `model.generate` is replaced, and the weights are whole.

    Args:
        trainer: the trainer.
        model: its model, unwrapped by accelerate.
        generate: what takes the place of `model.generate`.
    """
    # With ZeRO-3 the parent gathers them
    gathered = contextlib.nullcontext() if trainer.is_deepspeed_enabled else whole_weights(model)
    with gathered, generating_by(model, generate):
        yield
