"""How large a model's input embeddings are, as its decoder is given them."""

import torch
from torch import nn


def embedding_norm(backbone: nn.Module) -> torch.Tensor:
    """Root mean square of the norms of the input embeddings, a scalar without gradient."""
    embedding = backbone.get_input_embeddings()
    weight = embedding.weight.detach()
    return weight.float().pow(2).mean().mul(weight.shape[1]).sqrt() * embed_scale(embedding)


def embedding_rms(embedding: nn.Module) -> float:
    """Root mean square of an entry of the embeddings, as a decoder is given them."""
    return embedding.weight.detach().float().square().mean().sqrt().item() * float(embed_scale(embedding))


def embed_scale(embedding: nn.Module) -> torch.Tensor | float:
    return getattr(embedding, "embed_scale", 1.0)  # gemma3 and others multiply inside the embedding
