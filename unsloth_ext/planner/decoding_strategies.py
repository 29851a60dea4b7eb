"""Strategies that choose the next concept: greedy, sampled, in beams, or sampled with a gradient."""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from ..common.straight_through import gumbel_noise, straight_through
from .config import PlannerConfig
from .head import SharedBackboneUnifiedHead


class Step(NamedTuple):
    """The result of a prediction.

    Attributes:
        embeds (B, d): floating point, the concept's embedding without type. Arbitrary where the type has ended.
        alive (B,): bool, where there is a concept.
        order (B,): long, the rows to continue with. None means all, in place.
    """

    embeds: torch.Tensor
    alive: torch.Tensor
    order: torch.Tensor | None = None


class HardDecoding:
    """Choose concepts without a gradient.

    Args:
        head: the model's head.
        config: the planner's settings.
        origin (B,): long, the position of each row's separators.
        temperature: of sampling. None decodes greedily.
        generator: of the Gumbel noise. None means torch's own.

    Attributes:
        plan (B, n, Q): long, the plan so far.
    """

    def __init__(
        self,
        head: SharedBackboneUnifiedHead,
        config: PlannerConfig,
        origin: torch.Tensor,
        temperature: float | None = None,
        generator: torch.Generator | None = None,
    ):
        self.head, self.temperature, self.generator = head, temperature, generator
        self.plan = origin.new_full((len(origin), len(config.types), config.max_quota), -1)
        self.alive = torch.ones(self.plan.shape[:2], dtype=torch.bool, device=origin.device)

    def step(self, i: int, j: int, logits: torch.Tensor) -> Step:
        """Choose concept `j` of type `i`, both counted from 0, from logits (B, V_i + 1)."""
        if self.temperature is not None:
            logits = logits / self.temperature + gumbel_noise(logits, self.generator)
        return self.put(i, j, logits.argmax(-1), logits.shape[1] - 1)

    def put(self, i: int, j: int, choice: torch.Tensor, end: int) -> Step:
        """Write the choices (B,) of concept `j` into the plan. The choice `end` ends the type."""
        self.alive[:, i] &= choice < end
        alive = self.alive[:, i].clone()
        self.plan[:, i, j] = choice.masked_fill(~alive, -1)
        return Step(F.embedding(choice.clamp(max=end - 1), self.head.concepts(i)), alive)


class BeamDecoding(HardDecoding):
    """Search for the most likely plans, with K consecutive rows for every text.

    Attributes:
        scores (B / K, K): fp32, log p of the concepts so far, in descending order.
    """

    def __init__(self, head: SharedBackboneUnifiedHead, config: PlannerConfig, origin: torch.Tensor, beams: int):
        super().__init__(head, config, origin)
        self.scores = torch.full((len(origin) // beams, beams), -torch.inf, device=origin.device)
        self.scores[:, 0] = 0  # all beams are equal at first

    def step(self, i: int, j: int, logits: torch.Tensor) -> Step:
        log_probs = logits.log_softmax(-1)
        ended = torch.full_like(log_probs, -torch.inf)
        ended[:, -1] = 0
        log_probs = torch.where(self.alive[:, i, None], log_probs, ended)
        texts, beams = self.scores.shape
        scores = self.scores.to(log_probs.dtype)[..., None] + log_probs.view(texts, beams, -1)
        self.scores, best = scores.flatten(1).topk(beams)
        choices = log_probs.shape[1]
        order = (best // choices + beams * torch.arange(texts, device=best.device)[:, None]).flatten()
        self.plan, self.alive = self.plan[order], self.alive[order]
        return self.put(i, j, (best % choices).flatten(), choices - 1)._replace(order=order)


class DiverseBeamDecoding(HardDecoding):
    """Search for plans that differ (diverse beam search with one beam in each group, arXiv 1610.02424).

    Each text has K rows. Each row is a greedy plan with a penalty for every concept that an earlier row has in the same
    place. If the planner is more certain than the penalty, rows can still be equal.

    Attributes:
        scores (B / K, K): fp32, log p of the concepts so far, without penalties.
    """

    def __init__(
        self, head: SharedBackboneUnifiedHead, config: PlannerConfig, origin: torch.Tensor, beams: int, diversity: float
    ):
        super().__init__(head, config, origin)
        self.diversity = diversity
        self.scores = torch.zeros(len(origin) // beams, beams, device=origin.device)

    def step(self, i: int, j: int, logits: torch.Tensor) -> Step:
        log_probs = logits.log_softmax(-1).unflatten(0, self.scores.shape)
        alive = self.alive[:, i].view_as(self.scores)
        paid, choices = torch.zeros_like(log_probs[:, 0]), []
        for beam in range(log_probs.shape[1]):
            choice = (log_probs[:, beam] - self.diversity * paid).argmax(-1)
            paid = paid.scatter_add(1, choice[:, None], alive[:, beam, None].to(paid.dtype))
            choices.append(choice)
        choice = torch.stack(choices, dim=1)
        self.scores = self.scores + log_probs.gather(-1, choice[..., None])[..., 0] * alive
        return self.put(i, j, choice.flatten(), logits.shape[1] - 1)


class _Choices(NamedTuple):
    """The choices of one prediction of a type, with the fields of `SoftPlan`. `stay` is log(1 - p(<EOS>))."""

    open: torch.Tensor
    alive: torch.Tensor
    ids: torch.Tensor
    log_probs: torch.Tensor
    stay: torch.Tensor
    soft: torch.Tensor
    hard: torch.Tensor
    embeds: torch.Tensor


class SoftDecoding:
    """Sample concepts with the gradient of the expected concept. See `plan_soft`."""

    def __init__(
        self,
        head: SharedBackboneUnifiedHead,
        config: PlannerConfig,
        temperature: float,
        generator: torch.Generator | None,
    ):
        self.head, self.config, self.temperature, self.generator = head, config, temperature, generator
        self.steps: list[list[_Choices]] = [[] for _ in config.types]

    def step(self, i: int, j: int, logits: torch.Tensor) -> Step:
        """Choose concept `j` of type `i` from logits, as in `HardDecoding`."""
        end = logits.shape[1] - 1
        log_probs = logits.log_softmax(-1)
        perturbed = (logits + gumbel_noise(logits, self.generator)) / self.temperature
        choice = perturbed.argmax(-1)
        before = self.steps[i][-1] if j else None
        open_ = torch.ones_like(choice, dtype=torch.bool) if before is None else before.alive
        alive = open_ & (choice < end)
        stay = log_probs[:, :-1].logsumexp(-1)
        if before is not None and not self.config.multi_token:
            stay = torch.where(open_, stay, before.stay)
        table = self.head.concepts(i)
        hard = F.embedding(choice.clamp(max=end - 1), table)
        soft = perturbed[:, :-1].softmax(-1).to(table.dtype) @ table
        embeds = straight_through(hard, soft)
        ids = choice.masked_fill(~alive, -1)
        self.steps[i].append(_Choices(open_, alive, ids, log_probs, stay, soft, hard, embeds))
        return Step(embeds, alive)
