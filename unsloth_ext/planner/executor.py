"""The executor, which writes text from a plan without seeing what the planner read (ours).

    slots       BOS  SEP_1  C_1 ..  SEP_2  C_2 ..  x_0    x_1 ..
    positions   0    0      1 ..    0      1 ..    Q + 1  Q + 2 ..      Q the largest quota

Plans of a batch are padded on the left, so that x_0 is always predicted from the last slot before it. A null plan is
<BOS> <NULL>, both at position 0.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..common.layer_kinds import check_length
from ..common.logits import logits_of
from ..common.wrapping import backbone_of, unwrapped
from .head import concept_embeds, text_embeds
from .planning import SoftPlan
from .vocabulary import BOS, DROPPED, NULL, check_plan


@dataclass(frozen=True)
class Prefix:
    """Plans as the executor reads them, padded on the left.

    Attributes:
        embeds (B, P, d): in the model's dtype.
        mask (B, P): bool.
        positions (B, P): long.
    """

    embeds: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor


def executor_prefix(model: nn.Module, plan: torch.Tensor | SoftPlan, null: torch.Tensor | None = None) -> Prefix:
    """Turn plans into the slots before the text.

    Args:
        model: a causal LM with a planner, wrapped by PEFT or not.
        plan: plans (B, n, Q) long, or a `SoftPlan`, whose gradient then reaches the planner.
        null (B,): bool, rows whose plan is replaced by one learned embedding. None means no row.

    Returns:
        The slots.

    Raises:
        ValueError: `plan` does not fit the model's settings, or `null` has another shape or dtype.
    """
    backbone = backbone_of(model)
    config, head = backbone.planner_config, backbone.unified_head
    if isinstance(plan, SoftPlan):
        ids, embeds = plan.ids, plan.embeds
    else:
        check_plan(plan, config)
        ids, embeds = plan, concept_embeds(backbone, plan)
    rows = len(ids)
    if null is None:
        null = torch.zeros(rows, dtype=torch.bool, device=ids.device)
    if null.shape != (rows,) or null.dtype != torch.bool:
        raise ValueError(f"null {tuple(null.shape)} {null.dtype}: must be ({rows},) torch.bool, one for each plan")
    planned = ~null[:, None]
    slots = [head.special(row).expand(rows, 1, -1) for row in (BOS, NULL)]
    real, positions = [torch.ones_like(planned), ~planned], [0, 0]
    for i, kind in enumerate(config.types):
        slots += [head.sep(i).expand(rows, 1, -1), head.typed(embeds[:, i, : kind.quota], i)]
        real += [planned, planned & (ids[:, i, : kind.quota] >= 0)]
        positions += range(kind.quota + 1)
    mask = torch.cat(real, dim=1)
    # The stable sort moves real slots to the right and keeps their order
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)[:, -int(mask.sum(1).max()) :]
    dtype = backbone.get_input_embeddings().weight.dtype
    embeds = torch.cat(slots, dim=1).to(dtype)
    return Prefix(
        embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1])),
        mask.gather(1, order),
        torch.tensor(positions, device=ids.device)[order],
    )


def executor_forward(
    model: nn.Module,
    prefix: Prefix,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropped: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the hidden state from which each token of a text is predicted.

    Args:
        model: a causal LM with a planner, wrapped by PEFT or not.
        prefix: the plans.
        input_ids (B, T): long, texts padded on the right.
        attention_mask (B, T): long or bool. None means that every token is real.
        dropped (B, T): bool, tokens that are replaced in the input by a learned embedding (word dropout). They are
            still predicted. None means no token.

    Returns:
        Hidden states after the final norm (B, T, d), in the model's dtype: for each token, that of the slot before it.

    Raises:
        ValueError: a text is padded on the left.
    """
    backbone = backbone_of(model)
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if (valid[:, 1:] & ~valid[:, :-1]).any():
        raise ValueError(
            "attention_mask: texts of the executor must be padded on the right, since the plan comes before them"
        )
    read = input_ids.shape[1] - 1  # nothing is predicted from the last token
    embeds = text_embeds(backbone, input_ids[:, :read])
    if dropped is not None:
        lost = backbone.unified_head.special(DROPPED).to(embeds.dtype)
        embeds = torch.where(dropped[:, :read, None], lost, embeds)
    check_length(model, prefix.mask.shape[1] + read, "a plan")
    times = backbone.planner_config.max_quota + 1 + torch.arange(read, device=input_ids.device)
    # The mask is needed, because without it transformers takes restarted positions for packed documents
    return backbone(
        inputs_embeds=torch.cat([prefix.embeds, embeds], dim=1),
        attention_mask=torch.cat([prefix.mask, valid[:, :read]], dim=1).long(),
        position_ids=torch.cat([prefix.positions, times.expand(len(input_ids), -1)], dim=1),
        use_cache=False,
    ).last_hidden_state[:, prefix.mask.shape[1] - 1 :]


def text_nll(
    model: nn.Module,
    prefix: Prefix,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropped: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the negative log-likelihood -log p(x_t | plan, x_<t) of each token of a text.

    Texts include their end token: nothing is predicted after the last token.

    Args:
        model: a causal LM with a planner, wrapped by PEFT or not.
        prefix: the plans.
        input_ids (B, T): long, texts padded on the right.
        attention_mask (B, T): long or bool. None means that every token is real.
        dropped (B, T): bool, see `executor_forward`.

    Returns:
        (B, T) in fp32 or wider, 0 at pads.
    """
    hidden = executor_forward(model, prefix, input_ids, attention_mask, dropped)
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    logits = logits_of(unwrapped(model), hidden[valid])  # no logits for pads
    wide = torch.promote_types(logits.dtype, torch.float32)
    # The softmax converts to fp32 itself, so there is no second copy of the logits in fp32
    nll = -logits.log_softmax(-1, dtype=wide).gather(-1, input_ids[valid][:, None])[:, 0]
    return nll.new_zeros(input_ids.shape).masked_scatter(valid, nll)


def text_log_prob(
    model: nn.Module,
    prefix: Prefix,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    dropped: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute log p(text | plan), minus the sum of `text_nll`.

    Args:
        model: a causal LM with a planner, wrapped by PEFT or not.
        prefix: the plans.
        input_ids (B, T): long, texts padded on the right.
        attention_mask (B, T): long or bool. None means that every token is real.
        dropped (B, T): bool, see `executor_forward`.

    Returns:
        (B,) in fp32 or wider.
    """
    return -text_nll(model, prefix, input_ids, attention_mask, dropped).sum(1)
