"""Logits as the model's own head makes them, of hidden states or at some positions only."""

from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .wrapping import unwrapped


def logits_at(model: nn.Module, keep: torch.Tensor, **inputs: Any) -> ModelOutput:
    """The outputs of a causal LM, wrapped by PEFT and DDP or not, with logits at N positions instead of all B T.

    A hook hands the model's own head the hidden states of these positions, so that whatever the model does to its logits
    (scaling, soft-capping) is done to them, and gradients are those of `logits[keep]`.

    Args:
        keep (B, T) bool: which positions; N of them.
        inputs: of the forward, without labels.

    Returns:
        What the model returns, where `logits` (N, V) are in row order.

    Raises:
        ValueError: the model has no output embedding.
    """
    head = unwrapped(model).get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(unwrapped(model)).__name__} has no output embedding that makes its logits")

    def select(_: nn.Module, args: tuple) -> tuple:
        hidden = args[0]
        return (hidden[keep.to(hidden.device)][None], *args[1:])  # models take (B, T, d)

    handle = head.register_forward_pre_hook(select)
    try:
        outputs = model(**inputs)
    finally:
        handle.remove()
    outputs.logits = outputs.logits[0]
    return outputs


def logits_of(model: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Logits (..., V) of final-norm hidden states (..., d), with the scaling and soft-capping of the model's own head."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    if getattr(config, "logit_scale", None) is not None:  # cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:  # granite
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)  # gemma2
    return logits if cap is None else cap * torch.tanh(logits / cap)
