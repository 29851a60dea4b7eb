"""Evaluation mode for a while."""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model.eval()` for the block, then as it was."""
    was = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was)
