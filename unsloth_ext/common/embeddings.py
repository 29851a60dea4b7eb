"""Scale of a model's input embeddings, as its decoder gets them."""

import torch
from torch import nn


def embedding_norm(backbone: nn.Module) -> torch.Tensor:
    """Return the root mean square of the norms of the input embeddings: a scalar, fp32, without gradient."""
    embedding = backbone.get_input_embeddings()
    weight = embedding.weight.detach()
    return weight.float().pow(2).mean().mul(weight.shape[1]).sqrt() * embed_scale(embedding)


def embedding_rms(embedding: nn.Module) -> float:
    """Return the root mean square of the entries of an embedding, as the decoder gets them."""
    return embedding.weight.detach().float().square().mean().sqrt().item() * float(embed_scale(embedding))


def embed_scale(embedding: nn.Module) -> torch.Tensor | float:
    """Return the factor that some embeddings (Gemma 3) multiply their rows by; 1 for others."""
    return getattr(embedding, "embed_scale", 1.0)
