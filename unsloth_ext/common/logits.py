"""Logits from the model's own head, for hidden states or for some positions only."""

from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from .wrapping import unwrapped


def logits_at(model: nn.Module, keep: torch.Tensor, **inputs: Any) -> ModelOutput:
    """Run a causal LM and compute logits at N chosen positions instead of all B T.

    A hook gives the model's own head only the hidden states of these positions. So scaling and soft-capping apply as
    usual, and gradients are those of `logits[keep]`.

    Args:
        model: a causal LM, wrapped by PEFT and DDP or not.
        keep (B, T): bool, the N positions.
        **inputs: keywords for the forward, without labels.

    Returns:
        The model's outputs, with `logits` (N, V) in row order.

    Raises:
        ValueError: the model has no output embedding.
    """
    head = unwrapped(model).get_output_embeddings()
    if head is None:
        raise ValueError(f"{type(unwrapped(model)).__name__} has no output embedding")

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
    """Compute logits with the scaling and soft-capping of the model's own head.

    Args:
        model: a causal LM.
        hidden (..., d): hidden states after the final norm, in the dtype of the head.

    Returns:
        Logits (..., V) in the same dtype.
    """
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden)
    if getattr(config, "logit_scale", None) is not None:  # cohere
        logits = logits * config.logit_scale
    if getattr(config, "logits_scaling", None) is not None:  # granite
        logits = logits / config.logits_scaling
    cap = getattr(config, "final_logit_softcapping", None)  # gemma2
    return logits if cap is None else cap * torch.tanh(logits / cap)
