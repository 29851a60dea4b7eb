"""Thinking states: what position t is given, always made from position t-1.

| source           | formula                                                          | from                       |
|------------------|------------------------------------------------------------------|----------------------------|
| `projection`     | s_t = W h_{t-1} / (norm(W h_{t-1}) + 1e-8)                       | the dynamic projection     |
| `soft_embedding` | s_t = sum_v p_{t-1}(v) E[v] / sqrt(sum_v p_{t-1}(v)^2)           | arXiv 2505.18454, eq. 2    |

`h` is the last hidden state after the final norm, `p` the warped distribution that the next token was drawn from.
"""

import torch
from torch import nn


SOURCES = ("projection", "soft_embedding")
NORMS = ("unit", "embedding_rms", "none")


def project(backbone: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Projection states (..., d) from the hidden states (..., d) of the positions before, with gradients into W."""
    projection = backbone.thinking_projection
    states = projection(hidden.to(next(projection.parameters()).dtype))
    norm = backbone.thinking_config.thinking_norm
    if norm == "none":
        return states
    states = states / (torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=_wide(states)) + 1e-8)
    if norm == "embedding_rms":
        states = states * embedding_norm(backbone)
    return states.to(hidden.dtype)


def embedding_norm(backbone: nn.Module) -> torch.Tensor:
    """Root mean square of the norms of the input embeddings, a scalar without gradient."""
    embedding = backbone.get_input_embeddings()
    weight = embedding.weight.detach()
    return weight.float().pow(2).mean().mul(weight.shape[1]).sqrt() * _scale(embedding)


def soft_embedding(embedding: nn.Module, probs: torch.Tensor, candidates: int | None = None) -> torch.Tensor:
    """Soft-embedding states (..., d) of distributions (..., V).

    Args:
        candidates: an upper bound on how many entries of any row are non-zero (after top-k, top-p, min-p). Only that
            many rows of the embedding are then read; None reads them all.
    """
    weight = embedding.weight
    scale = probs.pow(2).sum(-1, keepdim=True).sqrt()
    if candidates is None or candidates * 4 >= probs.shape[-1]:  # gathering has its price too
        mixed = probs.to(weight.dtype) @ weight
    else:
        top, index = probs.topk(candidates, dim=-1)
        rows = nn.functional.embedding(index, weight)
        mixed = (top.to(weight.dtype).unsqueeze(-2) @ rows).squeeze(-2)
    return (mixed / scale).to(weight.dtype) * _scale(embedding)


def _scale(embedding: nn.Module) -> torch.Tensor | float:
    return getattr(embedding, "embed_scale", 1.0)  # gemma3 and others multiply inside the embedding


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
