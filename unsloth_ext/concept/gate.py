"""The choice of tokens that become concepts, with its gradients (ours; straight-through Gumbel: arXiv 1611.01144)."""

from dataclasses import dataclass

import torch
from torch import nn

from ..common.logits import logits_of
from ..common.straight_through import gumbel_noise, straight_through
from .packing import Texts
from .segmenters import Memory, boundaries


ENTROPY_ROWS = 1024  # tokens for which logits over the vocabulary are in memory at once


@dataclass(frozen=True)
class Choice:
    """The concept of each token.

    Attributes:
        concept (B, T): bool, the tokens that become one.
        ids (B, T, C): long, a codeword of each codebook, 0 where there is no concept.
        embeds (B, T, d): in the model's dtype, the concepts' embeddings with their gradient. Where there is no concept:
            that of the concept the token would become, with the factorised gate in training, else 0.
        weight (B, T): floating point, 1 where there is a concept, else 0, with the gradient of the probability. None
            for a choice without this gradient.
        logit (B, T): fp32 or wider, of being a concept. None if concepts were given.
        logits (B, T, C V + 1): fp32 or wider, of the head. None if concepts were given.
    """

    concept: torch.Tensor
    ids: torch.Tensor
    embeds: torch.Tensor
    weight: torch.Tensor | None = None
    logit: torch.Tensor | None = None
    logits: torch.Tensor | None = None

    @property
    def probability(self) -> torch.Tensor | None:
        """The probability (B, T) of being a concept."""
        return None if self.logit is None else self.logit.sigmoid()


def given(backbone: nn.Module, ids: torch.Tensor, valid: torch.Tensor) -> Choice:
    """Use these concepts, (B, T) or (B, T, C) long, with `<NULL>` for none. Gradients reach only their embeddings."""
    ids = ids if ids.dim() == 3 else ids[..., None]
    concept = (ids[..., 0] != backbone.concept_config.null) & valid
    ids = ids.masked_fill(~concept[..., None], 0)
    embeds = backbone.concept_embedding(ids)
    return Choice(concept, ids, embeds.to(backbone.get_input_embeddings().weight.dtype))


def decide(
    backbone: nn.Module,
    shallow: torch.Tensor,
    texts: Texts,
    memory: Memory,
) -> tuple[Choice, Memory]:
    """Decide on concepts with the head, by the settings. In training, sample.

    Args:
        backbone: the decoder with the concept modules.
        shallow (B, T, d): in the model's dtype, the states of the shallow layers.
        texts: the layout of the texts.
        memory: the segmenter's state before these tokens.

    Returns:
        The choice, and the segmenter's state after these tokens.
    """
    config, gate, training = backbone.concept_config, backbone.concept_gate, backbone.training
    logits = backbone.concept_head(shallow)
    codes, null = logits[..., :-1].unflatten(-1, (config.num_codebooks, -1)), logits[..., -1]
    known = next_entropy(backbone, shallow) if config.segmenter == "entropy" else codes[..., 0, :].logsumexp(-1)
    logit = known.to(null.dtype) - null
    literal = config.gate == "literal" and config.segmenter == "null"
    noise = gumbel_noise(logits) if literal and training else None
    if literal:
        noisy = logits if noise is None else logits + noise
        score = noisy[..., : config.num_concepts].amax(-1) - noisy[..., -1]
    else:
        score = logit
    score = score.detach() if gate.rescore is None else gate.rescore(score.detach())
    lengths = backbone.concept_head.length_logits
    found, length, memory = boundaries(
        gate.segment_as or config, texts.rows(score), texts.used, memory, None if lengths is None else lengths.detach()
    )
    concept = texts.back(found) & texts.valid
    if lengths is not None:
        logit = logit + lengths[(texts.back(length) - 1).clamp(0, len(lengths) - 1)]

    picked = codes[concept]
    if training:
        picked = picked + (gumbel_noise(picked) if noise is None else noise[concept][:, :-1].view_as(picked))
    ids = torch.zeros(*concept.shape, config.num_codebooks, dtype=torch.long, device=concept.device)
    two_sided = config.gate == "factorised" and training
    if two_sided:
        ids[~concept] = codes.detach()[~concept].argmax(-1)
    ids[concept] = picked.argmax(-1)
    embeds = backbone.concept_embedding(ids).to(shallow.dtype)
    if training:
        against = noisy[..., -1][concept] if literal else None
        soft = expected_embedding(backbone, picked, against).to(embeds.dtype)
        embeds = embeds.masked_scatter(concept[..., None], straight_through(embeds[concept], soft))
    if not two_sided:
        embeds = embeds * concept[..., None]
        ids = ids * concept[..., None]
        return Choice(concept, ids, embeds, None, logit, logits), memory
    probability = logit.sigmoid()
    weight = straight_through(concept.to(probability.dtype), probability)
    return Choice(concept, ids * concept[..., None], embeds, weight, logit, logits), memory


def expected_embedding(backbone: nn.Module, noisy: torch.Tensor, null: torch.Tensor | None) -> torch.Tensor:
    """Compute e_soft = sum_v y_v E_v with y = softmax(noisy / temperature), for concepts only.

    For all tokens this would be most of the cost.

    Args:
        backbone: the decoder with the concept modules.
        noisy (n, C, V): fp32 or wider, logits with their noise.
        null (n,): fp32 or wider, the logit of `<NULL>` with its noise, if the first codebook competes with it.

    Returns:
        (n, d) in the dtype of the embedding.
    """
    if null is not None:
        beside = torch.full_like(noisy[..., :1], -torch.inf)
        beside[:, 0, 0] = null
        noisy = torch.cat([noisy, beside], dim=-1)
    y = (noisy / backbone.concept_gate.temperature).softmax(-1)
    table = backbone.concept_embedding.weight
    return (y if null is None else y[..., :-1]).flatten(1).to(table.dtype) @ table


@torch.no_grad()
def next_entropy(backbone: nn.Module, shallow: torch.Tensor) -> torch.Tensor:
    """Return the entropy (B, T) of the next token, in nats, by the LM head on the shallow states (B, T, d)."""
    found = []
    for part in shallow.flatten(0, 1).split(ENTROPY_ROWS):
        logits = logits_of(backbone.concept_causal_lm, backbone.norm(part))
        logs = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        found.append(-(logs.exp() * logs).sum(-1))
    return torch.cat(found).view(shallow.shape[:2])
