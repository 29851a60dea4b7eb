"""Which tokens become which concepts, and with what gradient."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Choice:
    """Of each token its concept.

    Attributes:
        ids: (...) long, a concept or `<NULL>`.
        embeds: (..., d), the concepts' embeddings with their gradient; not looked at where there is none.
    """

    ids: torch.Tensor
    embeds: torch.Tensor


def given(backbone: nn.Module, ids: torch.Tensor) -> Choice:
    """These concepts; gradients reach their embeddings only."""
    return Choice(ids, backbone.concept_embedding(ids.masked_fill(ids == backbone.concept_config.null, 0)))


def chosen(
    backbone: nn.Module, concepts: torch.Tensor | Callable[[torch.Tensor], Choice], shallow: torch.Tensor
) -> Choice:
    """Concepts that are given as ids (...), or what `concepts` chooses from shallow states (..., d)."""
    return concepts(shallow) if callable(concepts) else given(backbone, concepts)


def likeliest(backbone: nn.Module, shallow: torch.Tensor) -> Choice:
    """The largest logit of the head on shallow states (..., d): how a trained model decides."""
    return given(backbone, backbone.concept_head(shallow).argmax(-1))


def gumbel_straight_through(
    backbone: nn.Module, shallow: torch.Tensor, temperature: float, generator: torch.Generator | None = None
) -> Choice:
    """A sample of the head's distribution; the embedding is the sampled one and has the gradient of the expected one.

        y = softmax((logits + g) / temperature),    e = e_hard + (e_soft - sg(e_soft)),    e_soft = sum_v y_v E_v

    Args:
        shallow: (..., d).
        temperature: more than 0.
        generator: of the Gumbel noise g; None: torch's own.
    """
    logits = backbone.concept_head(shallow)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
    tiny = torch.finfo(logits.dtype).tiny
    noise = -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()
    perturbed = (logits + noise) / temperature
    ids = perturbed.argmax(-1)
    concept = ids != backbone.concept_config.null
    table = backbone.concept_embedding.weight
    hard = F.embedding(ids[concept], table)
    # Only where there is a concept: a softmax over all codewords for every token would be most of the cost
    soft = perturbed[concept].softmax(-1)[:, :-1].to(table.dtype) @ table
    embeds = shallow.new_zeros(*ids.shape, table.shape[1], dtype=table.dtype)
    return Choice(ids, embeds.masked_scatter(concept[..., None], hard + (soft - soft.detach())))
