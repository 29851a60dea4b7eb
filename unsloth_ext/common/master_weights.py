"""Small trained modules beside a model in half precision: float32 weights that learn.

bfloat16 has 8 bits: the neighbours of 0.05 are 2e-4 away from it, and an optimizer's steps of less than half of that round
to nothing. So gates, projections, heads and codebooks have float32 weights whatever the model's dtype, and compute in
float32 on inputs that are cast up. Autocast is off inside: it is on in training and off in decoding, which must agree.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import nn


PEFT_ROWS = "trainable_tokens_delta"  # embeddings of single tokens, which PEFT keeps in a parameter of its own


class MasterWeights(nn.Module):
    """Put before a module's class: its floating point tensors stay float32, or wider, whatever is done to the model.

    `model.half()`, `model.to(torch.bfloat16)` and their like move them to the device and leave their values alone.

    Attributes:
        kept: False where somebody else has the master weights, such as DeepSpeed.
    """

    kept = True

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        return super()._apply((lambda x: _wide(x, fn(x))) if self.kept else fn, recurse)


class MasterLinear(MasterWeights, nn.Linear):
    """A linear layer on inputs (..., in) of any floating dtype; its outputs (..., out) have its own, float32 or wider."""

    @classmethod
    def of(cls, linear: nn.Linear) -> "MasterLinear":
        """One with the weights of another, and in its place."""
        weight = linear.weight
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, **beside(weight))
        made.load_state_dict(linear.state_dict())
        return made.train(linear.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with without_autocast(x.device):
            return super().forward(x.to(self.weight.dtype))


def beside(weight: torch.Tensor) -> dict[str, Any]:
    """Device and dtype of a small module that works beside this weight, which may be quantized."""
    dtype = torch.promote_types(weight.dtype, torch.float32) if weight.is_floating_point() else torch.float32
    return {"device": weight.device, "dtype": dtype}


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Autocast is off for the block."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def master_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters, by name, that are to be float32 or wider."""
    found: dict[str, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, MasterWeights) and module.kept:
            found |= dict(module.named_parameters(prefix))
    return found | {name: p for name, p in model.named_parameters() if PEFT_ROWS in name}


@torch.no_grad()
def widen(model: nn.Module, values: dict[nn.Parameter, torch.Tensor] | None = None) -> list[str]:
    """Give master weights that were narrowed, in place, float32 again; the names of those that were.

    Args:
        values: what they were before; of others, what is left of it.
    """
    narrow = {name: parameter for name, parameter in master_weights(model).items() if _is_narrow(parameter)}
    for parameter in narrow.values():
        parameter.data = (values or {}).get(parameter, parameter).to(parameter.device, torch.float32, copy=True)
    return list(narrow)


def copied_by_peft(model: nn.Module) -> dict[nn.Parameter, torch.Tensor]:
    """Of each master weight that PEFT has copied to train, the original."""
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
