"""Weights that FSDP2 (`torch.distributed.fsdp.fully_shard`) or DeepSpeed ZeRO-3 shard over processes."""

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.tensor import DTensor, distribute_tensor


def full(tensor: torch.Tensor) -> torch.Tensor:
    """Return the whole of a sharded tensor, and any other tensor itself. All processes have to call it.

    The whole of a parameter of ZeRO-3 is a copy.
    """
    if hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return this process's part of a sharded tensor, which may be empty, and any other tensor itself."""
    if hasattr(tensor, "ds_id"):
        return tensor.ds_tensor
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_whole(model: nn.Module) -> bool:
    """Return whether a model is sharded by FSDP2 or ZeRO-3, and all of its weights are gathered now."""
    units = any(isinstance(module, FSDPModule) for module in model.modules())
    return (units or any(hasattr(p, "ds_id") for p in model.parameters())) and is_gathered(model)


def within_forward(module: nn.Module, work: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """Return `work(x)`, which reads the weights of a module.

    If FSDP2 or ZeRO-3 shards them, and they are not gathered now, it runs as the module's forward. They are then gathered
    for it, and again for its backward.

    Args:
        module: a module without submodules.
        work: a function of one tensor.
        x: its argument, floating point.
    """
    if is_gathered(module):
        return work(x)
    vars(module)["forward"] = work
    try:
        return module(x)
    finally:
        del vars(module)["forward"]


def begin_at_root(model: nn.Module) -> None:
    """Let FSDP2 take the whole model for its root, although parts of it may be called first."""
    for state in _states(model):  # from the root on
        state._lazy_init()


def is_gathered(module: nn.Module) -> bool:
    """Return whether no engine shards a parameter of a module, or all are gathered now."""
    return not any(isinstance(p, DTensor) or _is_split(p) for p in module.parameters())


def mean_square(parameter: nn.Parameter) -> torch.Tensor:
    """Return the mean of the squares of a parameter, also of a sharded one: a scalar, float32, without gradient.

    All processes have to call it for a parameter that is sharded now.
    """
    if _is_split(parameter):
        group, part = parameter.ds_process_group, parameter.ds_tensor.detach().flatten()
        own = max(0, parameter.ds_numel - dist.get_rank(group) * part.numel())  # the rest is padding
        total = part[:own].float().square().sum()
        dist.all_reduce(total, group=group)
        return total / parameter.ds_numel
    return full(parameter.detach().float().square().mean())


def _is_split(parameter: nn.Parameter) -> bool:
    return hasattr(parameter, "ds_id") and parameter.ds_status.name != "AVAILABLE"


@contextlib.contextmanager
def whole_weights(model: nn.Module) -> Iterator[None]:
    """Gather the weights of a model once, and keep them whole in the block. All processes have to enter it.

    No process waits for another one in the block, so each can run as many forwards as it needs. It does nothing for a model
    that is not sharded.

    Args:
        model: the prepared model, but not DeepSpeed's engine around it.

    Raises:
        RuntimeError: FSDP1 shards the model.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise RuntimeError(
            "FSDP1 keeps weights in flat pieces, so this model cannot generate: use FSDP2 (fsdp_version: 2)"
        )
    with _gathered_by_fsdp2(model), _gathered_by_zero3(model):
        yield


@contextlib.contextmanager
@torch.no_grad()
def changing_weights(model: nn.Module, *modules: nn.Module) -> Iterator[None]:
    """Let the block change weights in place, and then put the changes where FSDP2 or DeepSpeed keeps them.

    DeepSpeed would otherwise undo them in its next step. All processes have to enter it and make the same changes.

    Args:
        model: the prepared model, but not DeepSpeed's engine around it.
        *modules: parts of it. The block may change their weights.
    """
    with whole_weights(model):
        yield
        changed = [(module, dict(module.named_parameters())) for module in modules]
        changed = [(module, {name: p.detach().clone() for name, p in found.items()}) for module, found in changed]
    for module, values in changed:
        for name, value in values.items():
            _put(module.get_parameter(name), value)


def _put(parameter: nn.Parameter, value: torch.Tensor) -> None:
    if isinstance(parameter, DTensor):
        parameter.copy_(distribute_tensor(value, parameter.device_mesh, parameter.placements))
    elif hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):  # of ZeRO-3; of ZeRO-1 and 2
        import deepspeed

        if hasattr(parameter, "ds_id"):
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.copy_(value)
            deepspeed.utils.safe_set_local_fp32_param(parameter, parameter.ds_tensor)
        else:
            deepspeed.utils.safe_set_full_fp32_param(parameter, value)


@contextlib.contextmanager
def _gathered_by_fsdp2(model: nn.Module) -> Iterator[None]:
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    states = _states(model)
    before = [state._training_state for state in states]
    if all(state is TrainingState.PRE_BACKWARD for state in before):  # not sharded, or in such a block already
        yield
        return
    begin_at_root(model)
    hooks = [
        hooks
        for part in model.modules()
        for hooks in (part._state_dict_pre_hooks, part._load_state_dict_pre_hooks, part._load_state_dict_post_hooks)
    ]
    kept = [OrderedDict(some) for some in hooks]
    for some in hooks:  # FSDP2 would shard weights when a state dict is made or loaded
        _keep(some, {key: hook for key, hook in some.items() if not _is_of(hook, "torch.distributed.fsdp.")})
    for unit, state in zip(units, states, strict=True):
        unit.unshard()
        # As in the backward, when FSDP2 does nothing for forwards: it would shard weights again after some
        state._training_state = TrainingState.PRE_BACKWARD
    try:
        yield
    finally:
        for some, old in zip(hooks, kept, strict=True):
            _keep(some, old | some)
        for unit, state, old in zip(units, states, before, strict=True):
            state._training_state = old
            unit.reshard()


@contextlib.contextmanager
def _gathered_by_zero3(model: nn.Module) -> Iterator[None]:
    split = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not split:
        yield
        return
    import deepspeed

    # DeepSpeed's hooks would split each module's weights again after its forward
    hooks = [hooks for module in model.modules() for hooks in (module._forward_pre_hooks, module._forward_hooks)]
    before = [OrderedDict(some) for some in hooks]
    with deepspeed.zero.GatheredParameters([p for p in split if _is_split(p)]):
        for some in hooks:
            _keep(some, {key: hook for key, hook in some.items() if not _is_of(hook, "deepspeed.")})
        try:
            yield
        finally:
            for some, old in zip(hooks, before, strict=True):
                _keep(some, old | some)


def _states(model: nn.Module) -> list[Any]:
    return [module._get_fsdp_state() for module in model.modules() if isinstance(module, FSDPModule)]


def _is_of(hook: Any, package: str) -> bool:
    return getattr(getattr(hook, "hook", hook), "__module__", "").startswith(package)


def _keep(hooks: dict[int, Any], kept: dict[int, Any]) -> None:
    """Leave `kept` in a module's own dictionary of hooks, in its order."""
    hooks.clear()
    hooks.update(kept)
