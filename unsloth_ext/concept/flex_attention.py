"""FlexAttention as an attention function for transformers, compiled on a GPU and uncompiled on a CPU for tests."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface


FLEX = "concept_flex"
FLEX_FROM = 2048  # slots; for fewer, SDPA with a mask is as fast


def flex_from(hidden: torch.Tensor) -> bool:
    """Return whether hidden states (B, S, d) should use FlexAttention: long ones on a GPU."""
    return hidden.device.type == "cuda" and hidden.shape[1] >= FLEX_FROM


@functools.cache
def kernel(device: str) -> Callable:
    """Return FlexAttention for a type of device, compiled for CUDA."""
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
    """Run FlexAttention on query (B, Hq, S, D) and key and value (B, Hkv, S, D). Return (B, S, Hq, D).

    Raises:
        ValueError: there is attention dropout, which FlexAttention does not support.
    """
    if dropout:
        raise ValueError(
            f"attention_dropout={dropout}: FlexAttention, used from {FLEX_FROM} tokens on, does not support it; set 0"
        )
    out = kernel(query.device.type)(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(FLEX, flex_forward)
