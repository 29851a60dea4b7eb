"""Soft tokens: thinking inputs that are mixtures of token embeddings with noise, and how likely a mixture is.

`soft_gaussian` (arXiv 2509.19170, eq. 6 and 10):

    x = p E + sigma N(0, I)  is fed                             log pi(x) = -|x - p E|^2 / (2 sigma^2) + constant

`soft_gumbel` (arXiv 2511.06411):

    g = log p + Gumbel(0, 1),  softmax(g / tau_g) E is fed      log pi(g) = sum_i -(z_i + exp(-z_i)),  z = g - log p

`p` is the distribution of the next token at `soft_temperature`, `E` the input embedding, tau_g `gumbel_temperature`. The
sum is over the tokens within `gumbel_top_k` and `gumbel_top_p`, and `p` is then the distribution among these.

Each soft token has a token: the most likely one of p (`soft_gaussian`) or of g (`soft_gumbel`). The thinking ends with the
token that completes the delimiter, or with EOS. This token is fed as it is. With `soft_gumbel` its probability is p, since
the largest of g is a sample of p (the Gumbel-max trick). With `soft_gaussian` it is not chosen by chance, so it is 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..common.embeddings import embedding_rms
from ..common.logits import logits_of
from ..common.sharding import begin_at_root
from ..common.wrapping import backbone_of
from .states import SOFT_SOURCES, TOKENS_PER_CHUNK, Warper, mean_rows, mix_embeddings


# What the likelihood needs of a rollout, beside the inputs that were fed: tensors of `ThinkingTrace`
SOFT_FIELDS = dict(zip(SOFT_SOURCES, (("noise_std",), ("candidates", "gumbels")), strict=True))
LIKELIHOODS = ("sum", "mean")


def gaussian_log_prob(
    noised: torch.Tensor, mean: torch.Tensor, std: torch.Tensor | float, likelihood: str = "sum"
) -> torch.Tensor:
    """Compute the log-density of noised mixtures, without its constant (arXiv 2509.19170, eq. 10).

    Args:
        noised (..., d): floating point, x.
        mean (..., d): floating point, p E.
        std (...): sigma, of the same dtype or a scalar.
        likelihood: `"sum"` over the d dimensions, or their `"mean"`.

    Returns:
        (...) in float32 or wider.
    """
    square = (_wide(noised) - _wide(mean)).square()
    return (square.sum(-1) if likelihood == "sum" else square.mean(-1)) / (-2 * std**2)


def gumbel_log_prob(gumbels: torch.Tensor, log_probs: torch.Tensor, likelihood: str = "sum") -> torch.Tensor:
    """Compute the log-density of noised log-probabilities (arXiv 2511.06411).

    Args:
        gumbels (..., k): floating point, g; minus infinity for tokens that are not kept.
        log_probs (..., k): floating point, log p of the same tokens.
        likelihood: `"sum"` over the kept tokens, or their `"mean"`, as in the authors' code.

    Returns:
        (...) in the dtype of the arguments.
    """
    dropped = gumbels.isneginf()
    z = gumbels.masked_fill(dropped, 0) - log_probs.masked_fill(dropped, 0)
    total = (-z - (-z).exp()).masked_fill(dropped, 0).sum(-1)
    return total if likelihood == "sum" else total / (~dropped).sum(-1)


def mixture(embedding: nn.Module, probs: torch.Tensor, candidates: int | None = None) -> torch.Tensor:
    """Compute the mean input embedding under distributions (arXiv 2509.19170, eq. 5).

    Args:
        embedding: the input embedding, with V rows. An engine may shard it.
        probs (..., V): floating point.
        candidates: as in `mean_rows`.

    Returns:
        (..., d) in the dtype of the embedding.
    """

    return mix_embeddings(embedding, probs, lambda rows, probs: mean_rows(rows, probs, candidates))


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def first_plain(thinking_mask: torch.Tensor) -> torch.Tensor:
    """Return (B, C) bool: the first token of each row that does not think, which ends the thinking."""
    plain = ~thinking_mask
    return plain & (plain.cumsum(-1) == 1)


@dataclass
class SoftToken:
    """The next soft token of B rows.

    Attributes:
        state (B, d): in the dtype of the embedding, what is fed.
        token (B,): long, its most likely token.
        log_prob (B,): float32, its log-likelihood.
        end_log_prob (B,): float32, that of `token` if it ends the thinking.
        kept: the tensors of `SOFT_FIELDS`, each (B, ...).
    """

    state: torch.Tensor
    token: torch.Tensor
    log_prob: torch.Tensor
    end_log_prob: torch.Tensor
    kept: dict[str, torch.Tensor]


class SoftTokens:
    """Draws the soft tokens of one decode.

    Args:
        backbone: the decoder with the thinking modules.
        noisy: whether there is noise. Without it, the inputs are the mixtures of p and softmax(log p / gumbel_temperature).
    """

    def __init__(self, backbone: nn.Module, noisy: bool):
        self.config, self.embedding, self.noisy = backbone.thinking_config, backbone.get_input_embeddings(), noisy
        self.gumbel = self.config.thinking_source == "soft_gumbel"
        top_k, top_p = (self.config.gumbel_top_k, self.config.gumbel_top_p) if self.gumbel else (0, 1.0)
        self.warper = Warper(self.config.soft_temperature, top_k, top_p, None)
        self.std = 0.0 if self.gumbel else self.config.noise_scale * embedding_rms(self.embedding)

    def draw(self, logits: torch.Tensor) -> SoftToken:
        """Draw soft tokens from the model's logits (B, V), floating point. The global RNG is used if there is noise."""
        scores = self.warper(logits.float())
        return self._gumbel(scores) if self.gumbel else self._gaussian(scores)

    def _gaussian(self, scores: torch.Tensor) -> SoftToken:
        mean = mixture(self.embedding, scores.softmax(-1))
        noise = torch.randn_like(mean) if self.noisy else torch.zeros_like(mean)
        state = mean + self.std * noise
        std = scores.new_full((len(scores),), self.std)
        log_prob = gaussian_log_prob(state, mean, std, self.config.noise_likelihood)
        return SoftToken(state, scores.argmax(-1), log_prob, torch.zeros_like(log_prob), {"noise_std": std})

    def _gumbel(self, scores: torch.Tensor) -> SoftToken:
        top, candidates = scores.topk(min(self.config.gumbel_top_k, scores.shape[-1]), dim=-1)
        log_probs = top.log_softmax(-1)
        noise = -torch.empty_like(log_probs).exponential_().log() if self.noisy else torch.zeros_like(log_probs)
        gumbels = log_probs + noise
        weights = (gumbels / self.config.gumbel_temperature).softmax(-1)
        probs = torch.zeros_like(scores).scatter(-1, candidates, weights)
        best = gumbels.argmax(-1, keepdim=True)
        return SoftToken(
            state=mixture(self.embedding, probs, candidates.shape[-1]),
            token=candidates.gather(-1, best).squeeze(-1),
            log_prob=gumbel_log_prob(gumbels, log_probs, self.config.noise_likelihood),
            end_log_prob=log_probs.gather(-1, best).squeeze(-1),
            kept={"candidates": candidates, "gumbels": gumbels},
        )


def soft_log_probs(
    model: nn.Module, hidden_states: torch.Tensor, trace: Any, token_log_probs: torch.Tensor
) -> torch.Tensor:
    """Put the log-likelihoods of soft tokens in the place of those of their tokens, with gradients.

    Args:
        model: the causal LM.
        hidden_states (B, C, d): in the model's dtype, those that produced the C tokens.
        trace: the `ThinkingTrace` of the rollout, with `thinking_states` and the tensors of `SOFT_FIELDS`.
        token_log_probs (B, C): float, log-probabilities of the tokens.

    Returns:
        (B, C) in the dtype of `token_log_probs`: of the soft tokens, of what ended the thinking, and of the other tokens
        as given.
    """
    begin_at_root(model)
    backbone = backbone_of(model)
    config, embedding = backbone.thinking_config, backbone.get_input_embeddings()

    def gaussian(hidden: torch.Tensor, state: torch.Tensor, std: torch.Tensor) -> torch.Tensor:
        scores = _wide(logits_of(model, hidden)) / config.soft_temperature
        return gaussian_log_prob(state, mixture(embedding, scores.softmax(-1)), std, config.noise_likelihood)

    def gumbel(
        hidden: torch.Tensor, ends: torch.Tensor, candidates: torch.Tensor, gumbels: torch.Tensor
    ) -> torch.Tensor:
        scores = _wide(logits_of(model, hidden).gather(-1, candidates)) / config.soft_temperature
        log_probs = scores.masked_fill(gumbels.isneginf(), -torch.inf).log_softmax(-1)
        chosen = log_probs.gather(-1, gumbels.argmax(-1, keepdim=True)).squeeze(-1)
        return torch.where(ends, chosen, gumbel_log_prob(gumbels, log_probs, config.noise_likelihood))

    ends = first_plain(trace.thinking_mask)
    chunk: Callable[..., torch.Tensor]
    parts: tuple[torch.Tensor, ...]
    if config.thinking_source == "soft_gaussian":
        token_log_probs = token_log_probs.masked_fill(ends, 0)
        where, parts, chunk = trace.thinking_mask, (trace.thinking_states, trace.noise_std), gaussian
    else:
        where, parts, chunk = trace.thinking_mask | ends, (ends, trace.candidates, trace.gumbels), gumbel
    chunks = list(zip(*(x[where].split(TOKENS_PER_CHUNK) for x in (hidden_states, *parts)), strict=True))
    if torch.is_grad_enabled() and len(chunks) > 1:
        found = [checkpoint(chunk, *some, use_reentrant=False) for some in chunks]
    else:
        found = [chunk(*some) for some in chunks]
    return token_log_probs.masked_scatter(where, torch.cat(found).to(token_log_probs.dtype))
