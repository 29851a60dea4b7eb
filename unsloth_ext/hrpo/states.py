"""Thinking states. The state of position t is made from position t-1.

| source           | formula                                                          | from                       |
|------------------|------------------------------------------------------------------|----------------------------|
| `projection`     | s_t = W h_{t-1} / (norm(W h_{t-1}) + 1e-8)                       | ours                       |
| `soft_embedding` | s_t = sum_v p_{t-1}(v) E[v] / sqrt(sum_v p_{t-1}(v)^2)           | arXiv 2505.18454, eq. 2    |

`h` is the last hidden state after the final norm, `p` the warped distribution that the next token was drawn from.
"""

from collections.abc import Callable

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

from unsloth_ext.common.embeddings import embed_scale, embedding_norm
from unsloth_ext.common.sharding import within_forward


SOFT_SOURCES = ("soft_gaussian", "soft_gumbel")  # see `soft_tokens`
SOURCES = ("projection", "soft_embedding", *SOFT_SOURCES)
NORMS = ("unit", "embedding_rms", "none")
TOKENS_PER_CHUNK = 512  # bounds the (tokens, V) distributions of thinking states


def project(backbone: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
    """Project hidden states to thinking states, with gradients into W.

    Args:
        backbone: the decoder with the thinking modules.
        hidden_states (..., d): floating point, those of the positions before.

    Returns:
        (..., d) in the dtype of `hidden_states`.
    """
    projected = backbone.thinking_projection(hidden_states)
    norm = backbone.thinking_config.thinking_norm
    return normalise(projected, norm, lambda: embedding_norm(backbone)).to(hidden_states.dtype)


def normalise(projected: torch.Tensor, norm: str, of_embedding: Callable[[], torch.Tensor]) -> torch.Tensor:
    """Give projected states (..., d) the norm that `thinking_norm` asks for.

    Args:
        projected (..., d): floating point.
        norm: one of `NORMS`.
        of_embedding: returns the mean norm of an input embedding, a scalar.

    Returns:
        (..., d) in the dtype of `projected`.
    """
    if norm != "none":
        projected = projected / (torch.linalg.vector_norm(projected, dim=-1, keepdim=True) + 1e-8)
    return projected * of_embedding() if norm == "embedding_rms" else projected


def soft_embedding(embedding: nn.Module, probs: torch.Tensor, candidates: int | None = None) -> torch.Tensor:
    """Compute soft-embedding states of distributions (arXiv 2505.18454, eq. 2).

    Args:
        embedding: the input embedding, with V rows. An engine may shard it.
        probs (..., V): floating point.
        candidates: as in `mix_rows`.

    Returns:
        (..., d) in the dtype of the embedding.
    """

    return mix_embeddings(embedding, probs, lambda rows, probs: mix_rows(rows, probs, candidates))


def mix_embeddings(
    embedding: nn.Module, probs: torch.Tensor, mix: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Mix the rows of an input embedding, and scale as the model scales its embeddings.

    Args:
        embedding: the input embedding, with V rows. An engine may shard it.
        probs (..., V): floating point.
        mix: makes (..., d) of the rows (V, d) and `probs`.

    Returns:
        (..., d) in the dtype of the embedding.
    """
    return within_forward(embedding, lambda probs: mix(embedding.weight, probs), probs) * embed_scale(embedding)


def mix_rows(rows: torch.Tensor, probs: torch.Tensor, candidates: int | None = None) -> torch.Tensor:
    """Compute the mean of rows under distributions, over the norms of the distributions (arXiv 2505.18454, eq. 2).

    Args:
        rows (V, d): floating point.
        probs (..., V): floating point.
        candidates: as in `mean_rows`.

    Returns:
        (..., d) in the dtype of the rows.
    """
    mixed = mean_rows(rows, probs, candidates)
    return (mixed / torch.linalg.vector_norm(probs, dim=-1, keepdim=True)).to(rows.dtype)


def mean_rows(rows: torch.Tensor, probs: torch.Tensor, candidates: int | None = None) -> torch.Tensor:
    """Compute the mean of rows under distributions.

    Args:
        rows (V, d): floating point.
        probs (..., V): floating point.
        candidates: an upper bound on the number of non-zero entries of a distribution (after top-k, top-p, min-p). Only
            that many rows are then read. None reads all.

    Returns:
        (..., d) in the dtype of the rows.
    """
    if candidates is None or candidates * 4 >= probs.shape[-1]:  # gathering many rows costs more
        return probs.to(rows.dtype) @ rows
    top, index = probs.topk(candidates, dim=-1)
    return (top.to(rows.dtype).unsqueeze(-2) @ nn.functional.embedding(index, rows)).squeeze(-2)


class Warper:
    """Temperature, top-k, top-p and min-p on scores (..., V), as `generate` applies them when it samples.

    With one warper, states, rollout and training have the same distribution. It also makes the states of greedy
    decoding.

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
        """Return the warper of a generation config."""
        return cls(config.temperature, config.top_k, config.top_p, config.min_p)

    def __call__(self, scores: torch.Tensor) -> torch.Tensor:
        return self.warpers(None, scores) if self.warpers else scores
