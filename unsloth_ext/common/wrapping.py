"""The model inside wrappers: DDP and its like, PEFT, the causal LM around its decoder."""

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The (PEFT) model inside DDP, DeepSpeed and their like."""
    while hasattr(model, "module"):
        model = model.module
    return model


def causal_lm_of(model: nn.Module) -> nn.Module:
    """The causal LM inside any PEFT or trainer wrapper."""
    model = unwrapped(model)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def backbone_of(model: nn.Module) -> nn.Module:
    """The decoder under a causal LM, through any PEFT or trainer wrapper."""
    causal_lm = causal_lm_of(model)
    backbone = causal_lm.base_model
    if backbone is causal_lm and hasattr(causal_lm, "lm_head"):
        return causal_lm.model  # Llama 4's text model: its prefix names nothing (transformers 5.17)
    return backbone
