"""The planner, which reads a text and <PLAN> and writes typed concepts (ours).

Positions continue after the text: <PLAN> is at U, every SEP_i at U + 1, and concept j of every type at U + 1 + j. So
distances within the plan are the same as for the executor. <EOS> is never read. A type may be empty.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from ..common.evaluation_mode import evaluating
from ..common.wrapping import backbone_of
from .decoding_strategies import BeamDecoding, DiverseBeamDecoding, HardDecoding, SoftDecoding
from .forward_passes import read_text, teacher_forced, write
from .head import concept_embeds
from .slot_sequence import SlotSequence
from .vocabulary import check_plan, plan_lengths


@dataclass(frozen=True)
class SoftPlan:
    """A sampled plan with its gradients. B texts, n types, Q the largest quota.

    Attributes:
        ids (B, n, Q): long, the plan.
        embeds (B, n, Q, d): floating point, what the executor reads, without types. Values are codewords, and 0 where
            there is no concept.
        soft, hard (B, n, Q, d): floating point, the expected and the chosen codeword, 0 where there is none.
        open (B, n, Q): bool, the predictions that were made: one for each concept, and one for the end if it was
            chosen.
        log_probs: for each type (B, J_i, V_i + 1) floating point, without noise, of the J_i <= quota steps of the
            longest row. Valid where `open[:, i, :J_i]`.
        eos (B, n, Q): floating point, p(<EOS>) without noise. A row that has ended keeps its last prediction (with
            `multi_token` there are further ones). 1 after the quota.
        expected_lengths (B, n): floating point, sum_j prod_{k <= j} (1 - eos_k).
    """

    ids: torch.Tensor
    embeds: torch.Tensor
    soft: torch.Tensor
    hard: torch.Tensor
    open: torch.Tensor
    log_probs: tuple[torch.Tensor, ...]
    eos: torch.Tensor
    expected_lengths: torch.Tensor


def plan_soft(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> SoftPlan:
    """Sample plans with a gradient. Concepts are fed back through the cache as

        e = e_hard + (e_soft - sg(e_soft)),    e_soft = sum_{v in V_i} y_v E_v,    y = softmax((l + g) / temperature)

    where e_hard is the argmax of l + g over V_i and <EOS_i>, and y is over V_i (straight-through Gumbel, arXiv
    1611.01144). Whether there is a concept gets its gradient from a weight on what the executor reads (ours),

        w_j = 1 + (a_j - sg(a_j)),    a_j = prod_{k <= j} (1 - p_k(<EOS>)).

    A type stops when every row of the batch has ended it, so ranks may run different numbers of passes.

    Args:
        model: a causal LM with a planner, wrapped by PEFT or not.
        input_ids (B, U): long, texts padded on either side.
        attention_mask (B, U): long or bool. None means that every token is real.
        temperature: the temperature of y. Samples follow the model's distribution at any temperature.
        generator: of the Gumbel noise g. None means torch's own.

    Returns:
        The plans.

    Raises:
        ValueError: the temperature is not positive; or gradient checkpointing is on, which only works for `multi_token`
            with types in parallel.
    """
    _check_temperature(temperature)
    backbone = backbone_of(model)
    config = backbone.planner_config
    one_pass = config.multi_token and len(config.groups) == 1
    slots, origin = read_text(backbone, input_ids, attention_mask, cached=not one_pass)
    strategy = SoftDecoding(backbone.unified_head, config, temperature, generator)
    write(slots, origin, strategy, config.groups)

    quota = config.max_quota
    found: dict[str, list] = {
        name: [] for name in ("ids", "embeds", "soft", "hard", "open", "eos", "survival", "log_probs")
    }
    for kind, steps in zip(config.types, strategy.steps):
        rest = kind.quota - len(steps)
        made = {name: torch.stack(parts, dim=1) for name, parts in zip(steps[0]._fields, zip(*steps))}
        stay = torch.cat([made["stay"], made["stay"][:, -1:].expand(-1, rest)], dim=1)
        survival = stay.cumsum(1).exp()
        found["survival"].append(F.pad(survival, (0, quota - kind.quota)))
        found["eos"].append(F.pad(-stay.expm1(), (0, quota - kind.quota), value=1.0))
        found["log_probs"].append(made["log_probs"])
        found["ids"].append(F.pad(made["ids"], (0, quota - len(steps)), value=-1))
        found["open"].append(F.pad(made["open"], (0, quota - len(steps))))
        weight = (1 + (survival - survival.detach()))[:, : len(steps), None]
        made["embeds"] = made["embeds"] * weight.to(made["embeds"].dtype)
        for name in ("embeds", "soft", "hard"):
            there = made[name] * made["alive"][..., None]
            found[name].append(F.pad(there, (0, 0, 0, quota - len(steps))))
    log_probs = tuple(found.pop("log_probs"))
    stacked = {name: torch.stack(parts, dim=1) for name, parts in found.items()}
    survival = stacked.pop("survival")
    return SoftPlan(**stacked, log_probs=log_probs, expected_lengths=survival.sum(-1))


@torch.no_grad()
def plan(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    num_return_sequences: int = 1,
    num_beams: int = 1,
    generator: torch.Generator | None = None,
    beam_diversity: float = 0.0,
) -> torch.Tensor:
    """Plan without gradients: greedily, by sampling, or by a beam search for the largest log p(plan | text).

    Args:
        model: a causal LM with a planner, wrapped by PEFT or not.
        input_ids (B, U): long, texts padded on either side. Each is read once.
        attention_mask (B, U): long or bool. None means that every token is real.
        do_sample: sample instead of decoding greedily.
        temperature: of samples.
        num_return_sequences: the number of plans for each text, which are consecutive rows. With beams the best is
            first.
        num_beams: the number of beams. 1 means no beam search.
        generator: of samples. None means torch's own.
        beam_diversity: the penalty, in nats, for a concept that an earlier beam has in the same place, once for each
            such beam (diverse beam search, arXiv 1610.02424, with one beam in each group). The first beam is then the
            greedy plan. 0 searches the most likely plans.

    Returns:
        (B * num_return_sequences, n, Q) long, see `unsloth_ext.planner.vocabulary`.

    Raises:
        ValueError: settings contradict each other, or there are fewer plans than requested.
    """
    _check_temperature(temperature)
    if num_beams < 1 or num_return_sequences < 1:
        raise ValueError(f"num_beams={num_beams}, num_return_sequences={num_return_sequences}: must be at least 1")
    if num_beams > 1 and do_sample:
        raise ValueError(f"num_beams={num_beams} with do_sample=True: choose one")
    if not do_sample and num_return_sequences > num_beams:
        raise ValueError(
            f"num_return_sequences={num_return_sequences} from num_beams={num_beams}: there are fewer; set "
            "do_sample=True or more beams"
        )
    if not 0 <= beam_diversity < math.inf:
        raise ValueError(f"beam_diversity={beam_diversity}: must be 0 nats (off) or more")
    backbone = backbone_of(model)
    config, head = backbone.planner_config, backbone.unified_head
    with evaluating(model):
        slots, origin = read_text(backbone, input_ids, attention_mask)
        copies = num_beams if num_beams > 1 else num_return_sequences
        if copies > 1:
            slots.read()
            slots.repeat(copies)
            origin = origin.repeat_interleave(copies)
        if num_beams == 1:
            strategy = HardDecoding(head, config, origin, temperature if do_sample else None, generator)
            write(slots, origin, strategy, config.groups)
            return strategy.plan
        if beam_diversity:
            strategy = DiverseBeamDecoding(head, config, origin, num_beams, beam_diversity)
            write(slots, origin, strategy, config.groups)
            scores, best = strategy.scores.sort(dim=1, descending=True, stable=True)
            found = strategy.plan.unflatten(0, scores.shape)
            found = found[torch.arange(len(found), device=best.device)[:, None], best]
            return found[:, :num_return_sequences].flatten(0, 1)
        if config.ordering == "sequential":
            strategy = BeamDecoding(head, config, origin, num_beams)
            write(slots, origin, strategy, config.groups)
            found, scores = strategy.plan.unflatten(0, strategy.scores.shape), strategy.scores
        else:
            found, scores = _best_together(slots, origin, num_beams)
        found, scores = found[:, :num_return_sequences], scores[:, :num_return_sequences]
    if scores.isinf().any():
        raise ValueError(f"num_return_sequences={num_return_sequences}: there are fewer plans under these quotas")
    return found.flatten(0, 1)


def _best_together(slots: SlotSequence, origin: torch.Tensor, beams: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Search the best plans (B, K, n, Q) and their scores (B, K) for types that do not see each other.

    The best concepts of each type are combined, type by type.
    """
    backbone = slots.backbone
    config, found, scores = backbone.planner_config, None, None
    # Types share one sequence: each is a branch, and what branches share is equal in all beams of a text
    for i in range(len(config.types)):
        strategy = BeamDecoding(backbone.unified_head, config, origin, beams)
        write(slots, origin, strategy, [[i]])
        plans = strategy.plan.unflatten(0, strategy.scores.shape)
        if i == 0:
            found, scores = plans, strategy.scores
            continue
        scores, best = (scores[:, :, None] + strategy.scores[:, None]).flatten(1).topk(beams)
        texts = torch.arange(len(best), device=best.device)[:, None]
        found = found[texts, best // beams]
        found[:, :, i] = plans[texts, best % beams, i]
    return found, scores


def plan_log_probs(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    plan: torch.Tensor,
) -> torch.Tensor:
    """Compute log p of each prediction of given plans, with gradients, in one pass.

    Args:
        model: a causal LM with a planner, wrapped by PEFT or not.
        input_ids (B, U): long, texts padded on either side.
        attention_mask (B, U): long or bool. None means that every token is real.
        plan (B, n, Q): long.

    Returns:
        (B, n, Q) in fp32 or wider: at slot j of a type, log p of its concept j, or of its end if it has j concepts, and
        0 after that. A type as long as its quota has no end.

    Raises:
        ValueError: `plan` does not fit the model's settings, or has another number of rows than `input_ids`.
    """
    backbone = backbone_of(model)
    config = backbone.planner_config
    check_plan(plan, config)
    if len(plan) != len(input_ids):
        raise ValueError(f"plan has {len(plan)} rows, input_ids {len(input_ids)}")
    found = []
    all_logits = teacher_forced(model, input_ids, attention_mask, concept_embeds(backbone, plan), plan >= 0)
    for i, logits in enumerate(all_logits):
        quota, end = logits.shape[1], logits.shape[2] - 1
        ids = plan[:, i, :quota]
        log_probs = logits.log_softmax(-1).gather(-1, ids.where(ids >= 0, end)[..., None])[..., 0]
        open_ = torch.arange(quota, device=plan.device) <= plan_lengths(plan)[:, i, None]
        found.append(F.pad(log_probs * open_, (0, config.max_quota - quota)))
    return torch.stack(found, dim=1)


def plan_log_prob(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    plan: torch.Tensor,
) -> torch.Tensor:
    """Compute log p(plan | text), the sum of `plan_log_probs`.

    Args:
        model: a causal LM with a planner, wrapped by PEFT or not.
        input_ids (B, U): long, texts padded on either side.
        attention_mask (B, U): long or bool. None means that every token is real.
        plan (B, n, Q): long.

    Returns:
        (B,) in fp32 or wider.
    """
    return plan_log_probs(model, input_ids, attention_mask, plan).sum((1, 2))


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: must be more than 0")
