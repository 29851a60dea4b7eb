"""Thinking states: what position t is given, always made from position t-1.

| source           | formula                                                          | from                       |
|------------------|------------------------------------------------------------------|----------------------------|
| `projection`     | s_t = W h_{t-1} / (norm(W h_{t-1}) + 1e-8)                       | the dynamic projection     |
| `soft_embedding` | s_t = sum_v p_{t-1}(v) E[v] / sqrt(sum_v p_{t-1}(v)^2)           | arXiv 2505.18454, eq. 2    |

`h` is the last hidden state after the final norm, `p` the warped distribution that the next token was drawn from.
"""

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


SOURCES = ("projection", "soft_embedding")
NORMS = ("unit", "embedding_rms", "none")


def project(backbone: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Projection states (..., d) from the hidden states (..., d) of the positions before, with gradients into W."""
    states = backbone.thinking_projection(hidden)
    norm = backbone.thinking_config.thinking_norm
    if norm != "none":
        states = states / (torch.linalg.vector_norm(states, dim=-1, keepdim=True) + 1e-8)
    if norm == "embedding_rms":
        states = states * embedding_norm(backbone)
    return states.to(hidden.dtype)


def embedding_norm(backbone: nn.Module) -> torch.Tensor:
    """Root mean square of the norms of the input embeddings, a scalar without gradient."""
    embedding = backbone.get_input_embeddings()
    weight = embedding.weight.detach()
    return weight.float().pow(2).mean().mul(weight.shape[1]).sqrt() * _scale(embedding)


def embedding_rms(embedding: nn.Module) -> float:
    """Root mean square of an entry of the embeddings, as a decoder is given them."""
    return embedding.weight.detach().float().square().mean().sqrt().item() * float(_scale(embedding))


def soft_embedding(embedding: nn.Module, probs: torch.Tensor, candidates: int | None = None) -> torch.Tensor:
    """Soft-embedding states (..., d) of distributions (..., V).

    Args:
        candidates: an upper bound on how many entries of any row are non-zero (after top-k, top-p, min-p). Only that
            many rows of the embedding are then read; None reads them all.
    """
    weight = embedding.weight
    scale = torch.linalg.vector_norm(probs, dim=-1, keepdim=True)
    if candidates is None or candidates * 4 >= probs.shape[-1]:  # gathering has its price too
        mixed = probs.to(weight.dtype) @ weight
    else:
        top, index = probs.topk(candidates, dim=-1)
        rows = nn.functional.embedding(index, weight)
        mixed = (top.to(weight.dtype).unsqueeze(-2) @ rows).squeeze(-2)
    return (mixed / scale).to(weight.dtype) * _scale(embedding)


def _scale(embedding: nn.Module) -> torch.Tensor | float:
    return getattr(embedding, "embed_scale", 1.0)  # gemma3 and others multiply inside the embedding


class Warper:
    """Temperature, top-k, top-p and min-p on scores (..., V), as `generate` applies them when it samples.

    One warper gives states, rollout and training the same distribution; greedy decoding keeps its states too.

    Attributes:
        truncates: whether some probabilities may become exactly zero.
    """

    def __init__(self, temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None):
        self.truncates = bool(top_k) or (top_p or 1.0) < 1.0 or bool(min_p)
        self.warpers = LogitsProcessorList()
        if temperature not in (None, 0, 1.0):
            self.warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self.warpers.append(TopKLogitsWarper(top_k))
        if (top_p or 1.0) < 1.0:
            self.warpers.append(TopPLogitsWarper(top_p))
        if min_p:
            self.warpers.append(MinPLogitsWarper(min_p))

    @classmethod
    def of(cls, config: GenerationConfig) -> "Warper":
        return cls(config.temperature, config.top_k, config.top_p, config.min_p)

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        return self.warpers(None, scores) if self.warpers else scores


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
