"""Small modules with float32 weights that are trained beside a model in half precision.

bfloat16 has 8 bits of precision: the neighbours of 0.05 are 2e-4 away, and optimizer steps of less than half of that
round to nothing. So gates, projections, heads and codebooks have float32 weights whatever the model's dtype. They
compute in float32 on inputs that are cast up. Autocast is off inside, because it is on in training and off in decoding
and both must agree.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn


PEFT_ROWS = "trainable_tokens_delta"  # PEFT's parameter for embeddings of single tokens


class MasterWeights(nn.Module):
    """Mixin that keeps a module's floating-point tensors in float32 or wider when the model is cast.

    `model.half()`, `model.to(torch.bfloat16)` and the like move these tensors to the device and keep their values. Put
    it before the class of the module.

    Attributes:
        kept: False if something else, such as DeepSpeed, has the master weights.
    """

    kept = True

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply((lambda x: _wide(x, fn(x))) if self.kept else fn, recurse)


class MasterLinear(MasterWeights, nn.Linear):
    """Linear layer from inputs (..., in) of any floating dtype to outputs (..., out) in its own dtype, float32 or
    wider.
    """

    @classmethod
    def of(cls, linear: nn.Linear) -> "MasterLinear":
        """Make a layer with the weights, device and training mode of another one."""
        weight = linear.weight
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, **beside(weight))
        made.load_state_dict(linear.state_dict())
        return made.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply the layer to (..., in) of any floating dtype. The result is (..., out) in the dtype of the weights."""
        with without_autocast(x.device):
            return super().forward(x.to(self.weight.dtype))


def beside(weight: torch.Tensor) -> dict[str, Any]:
    """Return the device and dtype for a small module that works with this weight, which may be quantized."""
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
    return {"device": weight.device, "dtype": dtype}


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Return a context in which autocast is off."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def master_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters, by name, that must be float32 or wider."""
    found: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, MasterWeights) and module.kept:
            found |= dict(module.named_parameters(prefix))
    return found | {name: p for name, p in model.named_parameters() if PEFT_ROWS in name}


@torch.no_grad()
def widen(model: nn.Module, values: dict[nn.Parameter, torch.Tensor] | None = None) -> list[str]:
    """Turn master weights that were narrowed into float32 again, in place.

    Args:
        model: the model.
        values: the original values of some parameters. The others are widened from their narrowed values.

    Returns:
        The names of the parameters that were changed.
    """
    narrow = {name: parameter for name, parameter in master_weights(model).items() if _is_narrow(parameter)}
    for parameter in narrow.values():
        parameter.data = (values or {}).get(parameter, parameter).to(parameter.device, torch.float32, copy=True)
    return list(narrow)


def copied_by_peft(model: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    """Map each trained copy that PEFT made of a master weight to the original."""
    found: dict[nn.Parameter, torch.Tensor] = {}
    for wrapper in model.modules():
        if isinstance(wrapper, ModulesToSaveWrapper) and isinstance(wrapper.original_module, MasterWeights):
            originals = dict(wrapper.original_module.named_parameters())
            for copy in wrapper.modules_to_save.values():
                found |= {parameter: originals[name].detach() for name, parameter in copy.named_parameters()}
    return found


def _is_narrow(x: torch.Tensor) -> bool:
    return x.is_floating_point() and torch.promote_types(x.dtype, torch.float32) != x.dtype


def _wide(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    return before.to(after.device, torch.float32) if _is_narrow(after) else after
