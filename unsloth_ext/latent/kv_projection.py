"""The projection of latent tokens' keys and values, which training uses to compare them with a teacher's (ours)."""

import torch
from torch import nn

from ..common.master_weights import MasterWeights, without_autocast


class KVProjection(MasterWeights):
    """A linear layer on keys and one on values (..., D), shared by all layers and heads, with an optional LayerNorm
    after each.

    The linear layers begin as the identity.
    """

    def __init__(self, head_dim: int, layer_norm: bool = False, **like):
        super().__init__()
        self.keys, self.values = nn.Linear(head_dim, head_dim, **like), nn.Linear(head_dim, head_dim, **like)
        for linear in (self.keys, self.values):
            nn.init.eye_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.keys_norm, self.values_norm = (
            nn.LayerNorm(head_dim, **like) if layer_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return projected keys (..., D) and values (..., D), both in the dtype of the weights."""
        with without_autocast(keys.device):
            keys, values = (x.to(self.keys.weight.dtype) for x in (keys, values))
            return self.keys_norm(self.keys(keys)), self.values_norm(self.values(values))
