"""Weights that FSDP2 shards over processes (`torch.distributed.fsdp.fully_shard`)."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a sharded tensor, and any other tensor itself. All processes have to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_whole(model: nn.Module) -> bool:
    """Return whether FSDP2 shards a model, and all of its weights are gathered now."""
    sharded = any(isinstance(module, FSDPModule) for module in model.modules())
    return sharded and not any(isinstance(parameter, DTensor) for parameter in model.parameters())


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Gather the weights of a model once, and keep them whole in the block. All processes have to enter it.

    No process waits for another one in the block, so each can run as many forwards as it needs. It does nothing for a model
    that FSDP2 does not shard.

    Args:
        model: the prepared model.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for unit in units for group in unit._get_fsdp_state()._fsdp_param_groups]
    meshes = [group.post_forward_mesh_info for group in groups]  # None: whole after a forward
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for group, mesh in zip(groups, meshes, strict=True):
            group.post_forward_mesh_info = mesh
        for unit in units:
            unit.reshard()
