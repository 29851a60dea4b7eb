"""Optimizer state that DeepSpeed ZeRO shards, by parameter: whole tensors to save, and to put back.

DeepSpeed flattens the parameters of a group into one float32 tensor and gives each process a part of it, with the optimizer
state of that part.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


MASTER = "master"  # the float32 weights of a parameter of another dtype
State = dict[str, torch.Tensor]


def flat_parts(optimizer: Any) -> list[torch.Tensor] | None:
    """Return this process's parts of the flat float32 weights; None for an optimizer other than that of ZeRO-1, 2 or 3, or
    with state on a disk.

    Args:
        optimizer: DeepSpeed's optimizer around a torch optimizer.
    """
    if getattr(optimizer, "swap_optimizer", False):
        return None
    names = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")
    return next((list(getattr(optimizer, name)) for name in names if hasattr(optimizer, name)), None)


def whole_state(optimizer: Any, parameters: dict[str, nn.Parameter]) -> Iterator[tuple[str, State]]:
    """Yield the name and the whole state of each parameter that has state. All processes have to use it up.

    Args:
        optimizer: DeepSpeed's optimizer around a torch optimizer.
        parameters: by name, the same on all processes.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    some = next((part for part in flat_parts(optimizer) or () if optimizer.optimizer.state.get(part)), None)
    if some is None:  # no step was taken
        return
    state = optimizer.optimizer.state[some]
    _link(optimizer)
    keys = [key for key, value in state.items() if isinstance(value, torch.Tensor) and value.shape == some.shape]
    common = {key: torch.as_tensor(value).detach().cpu() for key, value in state.items() if key not in keys}
    for name, parameter in parameters.items():
        if not _is_split(parameter):
            continue
        found = {key: safe_get_full_optimizer_state(parameter, key) for key in keys}
        if parameter.dtype != torch.float32:
            found[MASTER] = safe_get_full_fp32_param(parameter)
        shape = getattr(parameter, "ds_shape", parameter.shape)
        yield name, {key: value.detach().cpu().view(shape) for key, value in found.items()} | common


@torch.no_grad()
def put_state(optimizer: Any, parameters: dict[str, nn.Parameter], saved: dict[str, State]) -> None:
    """Put the state of parameters where DeepSpeed keeps it. State of other parameters is left out.

    Args:
        optimizer: DeepSpeed's optimizer around a torch optimizer.
        parameters: by name.
        saved: whole tensors by name.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    inner = optimizer.optimizer
    known = {name: state for name, state in saved.items() if name in parameters and _is_split(parameters[name])}
    if not known:
        return
    whole = {key for name, state in known.items() for key, value in state.items() if value.dim()} - {MASTER}
    common = {key: value for key, value in next(iter(known.values())).items() if not value.dim()}
    for part in flat_parts(optimizer) or ():
        inner.state[part] = {key: value.clone().to(part.device) for key, value in common.items()}
        inner.state[part] |= {key: torch.zeros_like(part) for key in whole}
    _link(optimizer)
    for name, state in known.items():
        parameter = parameters[name]
        for key in [*whole, *(key for key in state if key == MASTER)]:
            value = state[key].to(parameter.device)
            as_key = [] if key == MASTER else [key]
            if hasattr(parameter, "ds_id"):
                own = _own_part(parameter, value)
                parameter._z3_optimizer.set_local_hp_param(own, parameter, *as_key)
            elif as_key:
                safe_set_full_optimizer_state(parameter, value, key)
            else:
                safe_set_full_fp32_param(parameter, value)


def _link(optimizer: Any) -> None:
    """Let the parameters of ZeRO-1 and 2 find their state, which DeepSpeed looks up once, perhaps before there is any."""
    if hasattr(optimizer, "_lazy_init_hp_params_optimizer_state"):
        optimizer._hp_optimizer_states_linked = False
        optimizer._lazy_init_hp_params_optimizer_state()


def _is_split(parameter: nn.Parameter) -> bool:
    return parameter.requires_grad and (hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"))


def _own_part(parameter: nn.Parameter, value: torch.Tensor) -> torch.Tensor:
    """This process's part of a whole value, as ZeRO-3 splits it."""
    size = parameter.ds_tensor.ds_numel
    flat = value.flatten()
    start = size * torch.distributed.get_rank(parameter.ds_process_group)
    own = flat[start : start + size]
    return nn.functional.pad(own, (0, size - own.numel()))
