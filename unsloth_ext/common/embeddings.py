"""Scale of a model's input embeddings, as its decoder gets them."""

import torch
from torch import nn

from .sharding import mean_square


def embedding_norm(backbone: nn.Module) -> torch.Tensor:
    """Return the root mean square of the norms of the input embeddings: a scalar, fp32, without gradient.

    If an engine shards them, all processes have to call it.
    """
    embedding = backbone.get_input_embeddings()
    width = getattr(embedding.weight, "ds_shape", embedding.weight.shape)[1]  # ZeRO-3 shows no other shape
    return mean_square(embedding.weight).mul(width).sqrt() * embed_scale(embedding)


def embedding_rms(embedding: nn.Module) -> float:
    """Return the root mean square of the entries of an embedding, as the decoder gets them."""
    return mean_square(embedding.weight).sqrt().item() * float(embed_scale(embedding))


def embed_scale(embedding: nn.Module) -> torch.Tensor | float:
    """Return the factor that some embeddings (Gemma 3) multiply their rows by; 1 for others."""
    return getattr(embedding, "embed_scale", 1.0)
