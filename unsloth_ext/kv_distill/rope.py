"""Rotary embedding and its inverse, so that keys can be mixed without their positions (ours).

Mixing heads or times of rotated keys destroys relative positions: q(m) . k(n) depends on m - n only while every term of
a key is rotated by the same angle.
"""

from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .shapes import AttentionShape


class Rotary(nn.Module):
    """The rotation x -> R(t) x of queries and keys in llama, qwen2 and qwen3, and its inverse.

    For a model without rotary embedding it is the identity.
    """

    def __init__(self, shape: AttentionShape):
        super().__init__()
        self.embedding = None
        if shape.rope is not None:
            self.embedding = LlamaRotaryEmbedding(_llama(shape))

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Rotate x (..., B, L, H, T, D) by positions (B, T)."""
        return self._turn(x, positions, forwards=True)

    def undo(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Apply the inverse rotation, also for scaled rotary embeddings."""
        return self._turn(x, positions, forwards=False)

    def _turn(self, x: torch.Tensor, positions: torch.Tensor, forwards: bool) -> torch.Tensor:
        if self.embedding is None:
            return x
        cos, sin = (table[:, None, None] for table in self.embedding(x, positions))
        if not forwards:
            scale = self.embedding.attention_scaling**2
            cos, sin = cos / scale, -sin / scale
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        first, second = turned.chunk(2, dim=-1)
        turned = turned * cos + torch.cat([-second, first], dim=-1) * sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def _llama(shape: AttentionShape) -> LlamaConfig:
    """Return a configuration with these rotary parameters. Only they are read."""
    rope: dict[str, Any] = dict(shape.rope or {})
    positions = rope.pop("max_position_embeddings", 2048)
    if "rope_theta" not in rope:
        raise ValueError(
            f"rotary parameters {sorted(rope)}: models whose layers rotate differently can only be aligned with "
            "rope_space='post'"
        )
    return LlamaConfig(
        hidden_size=shape.num_heads * shape.head_dim,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=positions,
        rope_parameters={"rope_type": "default", **rope},
    )
