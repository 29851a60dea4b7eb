"""FlexAttention as transformers' layers call it: compiled on a GPU, and plain on a CPU, where it checks the mask."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface


FLEX = "concept_flex"
FLEX_FROM = 2048  # slots: below, SDPA with a mask is as fast


def flex_from(hidden: torch.Tensor) -> bool:
    """Whether hidden states (B, S, d) are for FlexAttention: long ones on a GPU."""
    return hidden.device.type == "cuda" and hidden.shape[1] >= FLEX_FROM


@functools.cache
def kernel(device: str) -> Callable:
    return torch.compile(flex_attention) if device == "cuda" else flex_attention


def flex_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: BlockMask,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query (B, Hq, S, D), key and value (B, Hkv, S, D) to (B, S, Hq, D).

    Raises:
        ValueError: attention dropout, which FlexAttention has not.
    """
    if dropout:
        raise ValueError(
            f"attention_dropout={dropout}: FlexAttention, for {FLEX_FROM} tokens and more, has none; set 0"
        )
    out = kernel(query.device.type)(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(FLEX, flex_forward)
