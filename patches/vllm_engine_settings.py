"""Patch of the engine that TRL's trainers make with `use_vllm` and `vllm_mode="colocate"`: it gets further settings.

TRL 1.15 makes its `vllm.LLM` with a fixed list of arguments. Inside `engine_settings`, the engine also gets those that a
function of ours returns when TRL makes it.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from .registry import Patch, Site, applied


NAME = "vllm_engine_settings"
_settings: ContextVar[Callable[[], dict[str, Any]] | None] = ContextVar("vllm_engine_settings", default=None)


@contextlib.contextmanager
def engine_settings(settings: Callable[[], dict[str, Any]]) -> Iterator[None]:
    """Give `settings()` to the engines that TRL makes in the block. They win over TRL's own arguments."""
    token = _settings.set(settings)
    try:
        with applied(NAME):
            yield
    finally:
        _settings.reset(token)


def _sites(*owners: Any) -> list[Site]:
    from trl.generation import vllm_generation

    return [(owner, "LLM") for owner in owners or (vllm_generation,)]


def _wrap(original: Any) -> Any:
    @functools.wraps(original, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        settings = _settings.get()  # None in another thread
        return original(*args, **{**kwargs, **(settings() if settings else {})})

    return make


PATCH = Patch(
    name=NAME,
    package="trl",
    target="trl.generation.vllm_generation.LLM",
    parameters=("model",),
    sites=_sites,
    wrap=_wrap,
    places=("trl/generation/vllm_generation.py:VLLMGeneration._init_vllm",),
    effect="The vLLM engine of a trainer gets the class that thinks, the delimiter, and the trainer's dtype and tokenizer.",
    reason="HRPO with `use_vllm=True`, while the trainer is constructed",
    upstream="no upstream issue is known",
    removable="when TRL passes arguments of the user to `vllm.LLM`",
    scoped=True,
)
