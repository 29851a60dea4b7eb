"""Patch of FSDP2: in `one_unit`, a model is sharded as a whole, and not layer by layer.

A loss can run several forwards of the same layers, with gradients between them that pass by a layer's output, such as those
of its keys and values. FSDP2 gathers the weights of a layer again when a gradient reaches its output. Other gradients find
no weights, or come after the layer's gradients were summed over processes, and are lost. The weights of a whole model stay
gathered from its forward to the end of its backward.
"""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

from torch import nn

from .registry import Patch, Site, applied


NAME = "fsdp2_one_unit"
_root: ContextVar[nn.Module | None] = ContextVar("fsdp2_one_unit", default=None)


@contextlib.contextmanager
def one_unit(model: nn.Module) -> Iterator[None]:
    """Let accelerate shard `model` as one unit, if it prepares it in the block."""
    token = _root.set(model)
    try:
        with applied(NAME):
            yield
    finally:
        _root.reset(token)


def _sites(*owners: Any) -> list[Site]:
    from torch.distributed import fsdp

    return [(owner, "fully_shard") for owner in owners or (fsdp,)]


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def shard(module: Any, *args: Any, **kwargs: Any) -> Any:
        root = _root.get()
        return original(module, *args, **kwargs) if root is None or module is root else module

    return shard


PATCH = Patch(
    name=NAME,
    package="accelerate",
    target="torch.distributed.fsdp.fully_shard",
    parameters=("module",),
    sites=_sites,
    wrap=_wrap,
    places=("accelerate/utils/fsdp_utils.py:fsdp2_prepare_model",),
    effect="FSDP2 shards a model as one unit.",
    reason="Trainers whose loss runs several forwards, while accelerate prepares their model",
    upstream="no upstream issue is known",
    removable="when accelerate has a setting for FSDP2 without units for embeddings and layers",
    scoped=True,
)
