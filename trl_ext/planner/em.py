"""Hard EM: the best of several candidate plans for each text, found in E-steps and cached.

E-step    z* = argmax over candidates of S(z) = log p(y | z) + log p(z | u) M-step    minimise -log p(y | z*) - log p(z*
| u)
"""

from dataclasses import dataclass

import torch
from torch import nn

from unsloth_ext.common.evaluation_mode import evaluating
from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.planner.config import PlannerConfig
from unsloth_ext.planner.executor import executor_prefix, text_nll
from unsloth_ext.planner.planning import plan, plan_log_prob

from . import monitors


TOKENS_PER_PASS = 2**13  # tokens of texts scored in one pass; one copy of the batch may have more


class PlanCache(nn.Module):
    """The best plans z* by sample id, on the CPU.

    Attributes:
        plans: (N, n, Q) int32.
        known: (N,) bool; whether a row has a plan.
    """

    def __init__(self, rows: int, types: int, quota: int):
        super().__init__()
        self.register_buffer("plans", torch.full((rows, types, quota), -1, dtype=torch.int32))
        self.register_buffer("known", torch.zeros(rows, dtype=torch.bool))

    def get(self, sample_id: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Look up plans.

        Args:
            sample_id (B,): long.

        Returns:
            Plans (B, n, Q) long, -1 where there is no concept, and known (B,) bool, both on the device of `sample_id`.
        """
        ids = sample_id.cpu()
        return self.plans[ids].long().to(sample_id.device), self.known[ids].to(sample_id.device)

    def put(self, sample_id: torch.Tensor, plans: torch.Tensor) -> None:
        """Store plans (B, n, Q) of the rows `sample_id` (B,) long. Ids below 0 are ignored."""
        kept = sample_id >= 0
        ids = sample_id[kept].cpu()
        self.plans[ids] = plans[kept].to(self.plans)
        self.known[ids] = True


@dataclass(frozen=True)
class EStep:
    """The result of an E-step for B rows with K candidates: the cached plan, then samples, then beams.

    Attributes:
        plans: (B, n, Q) long; the best plans, or the best sample in forced rows.
        old: (B, n, Q) long; the cached plans before.
        known: (B,) bool; rows that had a cached plan.
        scores: (B, K) float; S(z) in nats, -inf if there was no cached plan.
        candidates: (B, K, n, Q) long.
    """

    plans: torch.Tensor
    old: torch.Tensor
    known: torch.Tensor
    scores: torch.Tensor
    candidates: torch.Tensor

    @property
    def best(self) -> torch.Tensor:
        """The best score of each row, (B,)."""
        return self.scores.amax(1)

    def sums(self) -> torch.Tensor:
        """Sums of staleness, flips and margins over the rows that have them, each followed by the number of these rows:
        (6,) float64."""
        known = self.known
        gap = monitors.staleness_gap(self.scores[known, 0], self.best[known]) * known.sum()
        flips = monitors.flip_rate(self.old, self.plans, known) * known.sum()
        # A duplicate of a plan is not a second candidate
        same = (self.candidates[:, :, None] == self.candidates[:, None]).flatten(3).all(-1)
        again = same.tril(-1).any(-1) & ~(same[:, :, 0] & ~known[:, None])
        distinct = self.scores.masked_fill(again, -torch.inf)
        two = (distinct != -torch.inf).sum(1) > 1
        margin = monitors.top1_margin(distinct[two]) * two.sum() if two.any() else two.sum()
        return torch.stack([x.double() for x in (gap, known.sum(), flips, known.sum(), margin, two.sum())])


@torch.no_grad()
def e_step(
    model: nn.Module,
    batch: dict[str, torch.Tensor],
    old: torch.Tensor,
    known: torch.Tensor,
    samples: int,
    beams: int,
    temperature: float = 1.0,
    diversity: float = 0.0,
    forced: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> EStep:
    """Choose the best of the old plan, samples and beams for each row, in evaluation mode. Ties go to the first.

    Args:
        model: a causal LM with a planner, wrapped or not.
        batch: as of `PlannerCollator`.
        old (B, n, Q): long; the plans so far.
        known (B,): bool; rows that have a plan.
        samples, beams: number of sampled plans and of beams.
        temperature, generator: for sampling.
        diversity: of the beams, see `plan`.
        forced (B,): bool; rows that must take the best sample that differs from their old plan. If all samples equal
            it, one is replaced by a uniformly random plan, because a confident planner would sample nothing else.
    """
    read = batch["plan_input_ids"], batch["plan_attention_mask"]
    rows = len(old)
    found = [old[:, None]]
    if samples:
        drawn = plan(
            model, *read, do_sample=True, temperature=temperature, num_return_sequences=samples, generator=generator
        )
        drawn = drawn.unflatten(0, (rows, samples))
        if forced is not None:
            settled = forced & known & (drawn == old[:, None]).flatten(1).all(1)
            sizes = [kind.num_concepts for kind in backbone_of(model).planner_config.types]
            drawn[settled, 0] = monitors.random_like(drawn[settled, 0], sizes, generator)
        found.append(drawn)
    if beams:
        best = plan(model, *read, num_beams=beams, num_return_sequences=beams, beam_diversity=diversity)
        found.append(best.unflatten(0, (rows, beams)))
    candidates = torch.cat(found, dim=1)
    scores = score_plans(model, batch, candidates)
    scores[:, 0] = scores[:, 0].masked_fill(~known, -torch.inf)
    choice = scores.argmax(1)
    if forced is not None and samples:
        fresh = (candidates != old[:, None]).flatten(2).any(-1) | ~known[:, None]
        fresh[:, 0] = fresh[:, 1 + samples :] = False
        best_fresh = scores.masked_fill(~fresh, -torch.inf).argmax(1)
        choice = torch.where(forced & fresh.any(1), best_fresh, choice)
    chosen = candidates[torch.arange(rows, device=old.device), choice]
    return EStep(chosen, old, known, scores, candidates)


@torch.no_grad()
def score_plans(model: nn.Module, batch: dict[str, torch.Tensor], plans: torch.Tensor) -> torch.Tensor:
    """S(z) = log p(y | z) + log p(z | u) in nats, in evaluation mode.

    Args:
        model: a causal LM with a planner, wrapped or not.
        batch: as of `PlannerCollator`; tokens without a label do not count.
        plans (B, K, n, Q): long.

    Returns:
        (B, K), float.
    """
    rows, width = batch["input_ids"].shape
    together = max(1, TOKENS_PER_PASS // (rows * width))
    scored = batch["labels"][:, 1:] != -100
    found = []
    with evaluating(model):
        for some in plans.split(together, dim=1):
            times = some.shape[1]
            u, mask, ids, valid, counted = (
                x.repeat_interleave(times, dim=0)
                for x in (
                    batch["plan_input_ids"],
                    batch["plan_attention_mask"],
                    batch["input_ids"],
                    batch["attention_mask"],
                    scored,
                )
            )
            flat = some.flatten(0, 1)
            nll = text_nll(model, executor_prefix(model, flat), ids, valid) * counted
            found.append((plan_log_prob(model, u, mask, flat) - nll.sum(1)).unflatten(0, (rows, times)))
    return torch.cat(found, dim=1)


def number_of_plans(config: PlannerConfig) -> int:
    """The number of possible plans under these settings."""
    total = 1
    for kind in config.types:
        total *= sum(kind.num_concepts**length for length in range(kind.quota + 1))
    return total


class EStepSchedule(nn.Module):
    """When the next E-step is due: every M steps, M = `e_step_every` times a scale, between 1 and `most`.

    With `adaptive` (v3.1, switch 3), the scale is halved after an E-step whose staleness is above the threshold, and
    doubled if it is below a quarter of it.

    Args:
        adaptive: whether the scale changes.
        threshold: staleness in nats.
        most: largest M that doubling reaches.

    Attributes:
        scale: a power of two; scalar float64.
        last: step of the last E-step, -1 before the first; scalar long.
    """

    def __init__(self, adaptive: bool, threshold: float, most: int):
        super().__init__()
        self.adaptive, self.threshold, self.most = adaptive, threshold, most
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("last", torch.full((), -1, dtype=torch.long))

    def interval(self, every: int) -> int:
        """M, the current interval."""
        return max(1, min(round(every * self.scale.item()), max(every, self.most)))

    def due(self, step: int, every: int) -> bool:
        """Whether all rows of step `step`, counted from 0, get an E-step."""
        return self.last < 0 or step - self.last >= self.interval(every)

    def done(self, step: int, every: int, staleness: float | None) -> None:
        """Record an E-step at step `step`. `staleness` is None if no row had a plan before."""
        self.last.fill_(step)
        if not self.adaptive or staleness is None:
            return
        if staleness > self.threshold and self.interval(every) > 1:
            self.scale *= 0.5
        elif staleness < self.threshold / 4 and self.interval(every) < self.most:
            self.scale *= 2
