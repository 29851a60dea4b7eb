"""Access to the model inside wrappers such as DDP and PEFT."""

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the (PEFT) model inside DDP, DeepSpeed and the like."""
    while hasattr(model, "module"):
        model = model.module
    return model


def causal_lm_of(model: nn.Module) -> nn.Module:
    """Return the causal LM inside any PEFT or trainer wrapper."""
    model = unwrapped(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(model: nn.Module) -> nn.Module:
    """Return the decoder of a causal LM, through any PEFT or trainer wrapper."""
    causal_lm = causal_lm_of(model)
    backbone = causal_lm.base_model
    if backbone is causal_lm and hasattr(causal_lm, "lm_head"):
        return causal_lm.model  # Llama 4's text model, whose prefix names no attribute (transformers 5.17)
    return backbone
