"""Thinking modules in a PEFT adapter, which trains and saves them and turns them off with itself."""

from typing import Any

from peft import PeftConfig, PeftModel
from peft.utils.other import _set_trainable
from torch import nn

from ..common.attaching import with_modules
from .method import METHOD
from .method import MODULES as THINKING_MODULES


def with_thinking_modules(config: PeftConfig) -> dict[str, Any]:
    """Return the fields of a PEFT config that train and save the thinking modules in full and keep LoRA off them.

    Raises:
        ValueError: the PEFT method has no `modules_to_save`.
    """
    return with_modules(config, METHOD)


def join_adapter(model: PeftModel) -> None:
    """Add newly attached modules to the active adapter, which already exists."""
    name = model.active_adapter
    config = model.peft_config[name]
    config.modules_to_save = with_thinking_modules(config)["modules_to_save"]
    _set_trainable(model, name, inference_mode=config.inference_mode, module_names=THINKING_MODULES)


class Unloaded(nn.Module):
    """Replacement for PEFT's untrained original of a thinking module. An adapter that is off does not think."""

    def forward(self, *_: Any) -> None:
        raise RuntimeError(
            "a thinking module was called with its adapter off or unloaded; pass no thinking states then, or merge the "
            "adapter instead of unloading it"
        )


def free_originals(backbone: nn.Module) -> None:
    """Drop PEFT's untrained copies of the thinking modules, 3 d^2 parameters that nothing reads.

    Call it when no more adapters will be added, since PEFT starts new ones from these copies.
    """
    for name in THINKING_MODULES:
        wrapper = getattr(backbone, name)
        if hasattr(wrapper, "original_module"):
            wrapper.original_module = Unloaded()
