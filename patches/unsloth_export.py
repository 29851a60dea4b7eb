"""Patch of Unsloth's exports (2026.10.9), which then refuse a model whose modules they would leave out.

The exports (merged, 4-bit, FP8, torchao, GGUF, OpenVINO, GGML, and pushes of these) write no modules that the model's
class does not know. All of them first call `_refuse_model_parallel_export`. `save_pretrained_merged` is allowed by its
own patch, which writes what Unsloth leaves out.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from .registry import Patch, Site
from .save_pretrained import describer


_allowed: ContextVar[bool] = ContextVar("allowed", default=False)


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """Allow exports inside the context."""
    token = _allowed.set(True)
    try:
        yield
    finally:
        _allowed.reset(token)


def refuse(model: Any, method: str) -> None:
    """Raise a ValueError if the export with this name would leave out a part of the model."""
    if describer(model) is not None and not _allowed.get():
        raise ValueError(
            f"{method}: Unsloth's export would leave out this model's thinking modules. Save the adapter with "
            "model.save_pretrained(folder), or the whole model with save_pretrained_merged(folder, tokenizer) or "
            "FastThinkingModel.merge(model).save_pretrained(folder). FastThinkingModel.merge(model, keep_thinking=False) "
            "gives a plain model, which every export supports"
        )


def _sites(*owners: Any) -> list[Site]:
    import unsloth  # noqa: F401
    from unsloth import save

    return [(owner, "_refuse_model_parallel_export") for owner in owners or (save,)]


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def refuse_model_parallel_export(model, method, *args, **kwargs):
        refuse(model, method)
        return original(model, method, *args, **kwargs)

    return refuse_model_parallel_export


PATCH = Patch(
    name="unsloth_export",
    package="unsloth",
    target="unsloth.save._refuse_model_parallel_export",
    parameters=("model", "method"),
    sites=_sites,
    wrap=_wrap,
    places=("unsloth/models/_utils.py:_refuse_model_parallel_export",),
    effect="Unsloth's exports raise an error for a model whose thinking modules they would leave out.",
    reason="HRPO on Unsloth: an export would drop the thinking modules without a message",
    upstream="no upstream issue is known",
    removable="when Unsloth's exports write modules that the model's class does not know",
)
