"""Parameter groups by role: a learning rate and a gradient bound for each kind of module, on any torch optimizer."""

import torch
from torch import nn

from unsloth_ext.common.sharding import full


def split_by_role(optimizer: torch.optim.Optimizer, model: nn.Module, rates: dict[str, float]) -> None:
    """Split the optimizer's parameter groups by role, in place. Other settings of a group are kept.

    Args:
        optimizer: the optimizer to change.
        model: the model that names the parameters.
        rates: learning rate of each role. A parameter has a role if a component of its name begins with the role's
            name. Parameters without a role keep their rate under the role "policy".
    """
    role_of = {parameter: role for name, parameter in model.named_parameters() for role in rates if f".{role}" in name}
    groups = []
    for group in optimizer.param_groups:
        for role in (None, *rates):
            params = [p for p in group["params"] if role_of.get(p) == role]
            if params:
                rate = group["lr"] if role is None else rates[role]
                groups.append({**group, "params": params, "lr": rate, "role": role or "policy"})
    optimizer.param_groups[:] = groups


def clip_each_role(optimizer: torch.optim.Optimizer, max_norm: float) -> dict[str, torch.Tensor]:
    """Clip the gradient norm of each role separately, in place.

    Args:
        optimizer: an optimizer that `split_by_role` has split.
        max_norm: the bound for each role.

    Returns:
        The norm of each role before clipping: scalars in the dtype of the gradients.
    """
    by_role: dict[str, list[torch.Tensor]] = {}
    for group in optimizer.param_groups:
        by_role.setdefault(group["role"], []).extend(group["params"])
    # torch puts the norm of an empty list of gradients on the CPU
    return {
        role: full(nn.utils.clip_grad_norm_(params, max_norm)).to(params[0].device) for role, params in by_role.items()
    }
