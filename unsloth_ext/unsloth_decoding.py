"""Unsloth's fast decode path, as far as hybrid decoding must know it."""

from typing import Any

from torch import nn


def returning_hidden_states(model: nn.Module) -> Any | None:
    """A context in which Unsloth's forwards return hidden states for logits; None on a stock model."""
    return None
