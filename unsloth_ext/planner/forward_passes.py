"""Passes of the planner: over the text, over concepts one by one or at once, and over a given plan."""

import torch
from torch import nn

from ..common.wrapping import backbone_of
from .config import PlannerConfig
from .decoding_strategies import HardDecoding, SoftDecoding
from .head import text_embeds
from .slot_sequence import EVERYBODY, SlotSequence
from .vocabulary import PLAN


def read_text(
    backbone: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, cached: bool = True
) -> tuple[SlotSequence, torch.Tensor]:
    """Start a slot sequence with the text and <PLAN>, which are not read yet.

    Args:
        backbone: the decoder.
        input_ids (B, U): long.
        attention_mask (B, U): long or bool. None means that every token is real.
        cached: whether the sequence can be read more than once.

    Returns:
        The sequence and the plan's origin (B,) long, the position of its separators.
    """
    valid = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    slots = SlotSequence(backbone, len(input_ids), input_ids.device, cached)
    length = valid.sum(1)
    slots.add(text_embeds(backbone, input_ids), (valid.cumsum(1) - 1).clamp(min=0), valid)
    slots.add(backbone.unified_head.special(PLAN), length[:, None])
    return slots, length + 1


def write(
    slots: SlotSequence, origin: torch.Tensor, strategy: HardDecoding | SoftDecoding, groups: list[list[int]]
) -> None:
    """Write the types, group after group, and add to the slot sequence what later groups may see.

    Args:
        slots: the sequence, which holds the text and <PLAN>.
        origin (B,): long, the position of the separators.
        strategy: chooses the concepts.
        groups: the types that are written together.
    """
    config, head = slots.backbone.planner_config, slots.backbone.unified_head
    for group in groups:
        last = group is groups[-1]
        if config.multi_token:
            _write_at_once(slots, origin, strategy, group, last)
            continue
        for i in group:
            _open_type(slots, origin, i)
        going, j = list(group), 0
        while going:
            hidden = slots.read()[:, -len(going) :]
            steps = [(i, strategy.step(i, j, head(hidden[:, k], i))) for k, i in enumerate(going)]
            going, j = [], j + 1
            for i, step in steps:
                if step.order is not None:
                    slots.reorder(step.order)
                if not step.alive.any():
                    continue
                if j < config.types[i].quota:
                    going.append(i)
                if i in going or not last:
                    embeds = head.typed(step.embeds, i)[:, None]
                    slots.add(embeds, origin[:, None] + j, step.alive[:, None], _branch(config, i))


def _write_at_once(
    slots: SlotSequence, origin: torch.Tensor, strategy: HardDecoding | SoftDecoding, group: list[int], last: bool
) -> None:
    head = slots.backbone.unified_head
    counts = [_open_type(slots, origin, i) for i in group]
    for i, part in zip(group, slots.read()[:, -sum(counts) :].split(counts, dim=1)):
        logits = head(part[:, 1:], i)
        written: list[torch.Tensor] = []
        for j in range(logits.shape[1]):
            step = strategy.step(i, j, logits[:, j])
            if step.order is not None:
                slots.reorder(step.order)
                logits = logits[step.order]
                written = [(embeds[step.order], alive[step.order]) for embeds, alive in written]
            written.append((head.typed(step.embeds, i), step.alive))
        if not last:
            embeds, alive = (torch.stack(parts, dim=1) for parts in zip(*written))
            slots.add(embeds, origin[:, None] + torch.arange(1, len(written) + 1, device=origin.device), alive)


def teacher_forced(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    embeds: torch.Tensor,
    alive: torch.Tensor,
) -> list[torch.Tensor]:
    """Compute the logits of a plan's predictions in one pass.

    Args:
        model: a causal LM with a planner, wrapped by PEFT or not.
        input_ids (B, U): long.
        attention_mask (B, U): long or bool. None means that every token is real.
        embeds (B, n, Q, d): floating point, concepts without types.
        alive (B, n, Q): bool, where there is a concept.

    Returns:
        For each type (B, quota_i, V_i + 1), in fp32 or wider.
    """
    backbone = backbone_of(model)
    config, head = backbone.planner_config, backbone.unified_head
    slots, origin = read_text(backbone, input_ids, attention_mask, cached=False)
    starts = []
    for i, kind in enumerate(config.types):
        later = config.ordering == "sequential" and i < len(config.types) - 1
        starts.append(slots.length + config.multi_token)
        _open_type(slots, origin, i)
        # Nothing is predicted from the last concept; concepts after queries are only for other types
        count = kind.quota if later else 0 if config.multi_token else kind.quota - 1
        if count:
            positions = origin[:, None] + torch.arange(1, count + 1, device=origin.device)
            slots.add(head.typed(embeds[:, i, :count], i), positions, alive[:, i, :count], _branch(config, i))
    hidden = slots.read()
    return [head(hidden[:, start : start + kind.quota], i) for i, (start, kind) in enumerate(zip(starts, config.types))]


def _branch(config: PlannerConfig, i: int) -> int:
    """Return the branch of a type's separator and concepts."""
    return i if config.ordering == "parallel" else EVERYBODY


def _open_type(slots: SlotSequence, origin: torch.Tensor, i: int) -> int:
    """Add the separator of a type, and its queries if it has any. Return the number of slots."""
    config, head = slots.backbone.planner_config, slots.backbone.unified_head
    slots.add(head.sep(i), origin[:, None], branch=_branch(config, i))
    if not config.multi_token:
        return 1
    quota = config.types[i].quota
    slots.add(head.queries(i), origin[:, None] + torch.arange(1, quota + 1, device=origin.device), branch=i)
    return 1 + quota
