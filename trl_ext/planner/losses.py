"""Losses of planner and executor besides the executor's cross-entropy. Ours. The trainer averages them over rows."""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.planner.executor import executor_prefix, text_nll
from unsloth_ext.planner.forward_passes import teacher_forced
from unsloth_ext.planner.head import concept_embeds
from unsloth_ext.planner.planning import SoftPlan
from unsloth_ext.planner.vocabulary import plan_lengths

from ..common.codeword_usage import usage_kl_to_uniform


def commitment_loss(soft: SoftPlan) -> torch.Tensor:
    """1 - cos(e_soft, sg(e_hard)), averaged over the concepts of each plan (B, n, Q): (B,) float32; 0 for an empty
    plan."""
    alive = soft.ids >= 0
    cosine = F.cosine_similarity(soft.soft.float(), soft.hard.detach().float(), dim=-1)
    return ((1 - cosine) * alive).sum((1, 2)) / alive.sum((1, 2)).clamp(min=1)


def loss_eos(soft: SoftPlan, quotas: list[int]) -> torch.Tensor:
    """-log p(<EOS>) at the last slot of types that reach their quota without an end, averaged over types.

    Args:
        soft: plans (B, n, Q) with their log-probabilities.
        quotas: the quota of each type.

    Returns:
        (B,), floating point, in nats.
    """
    lengths = plan_lengths(soft.ids)
    total = torch.zeros(len(lengths), device=lengths.device)
    for i, quota in enumerate(quotas):
        if soft.log_probs[i].shape[1] == quota:  # some row reaches the quota
            total = total - torch.where(lengths[:, i] == quota, soft.log_probs[i][:, -1, -1], 0)
    return total / len(quotas)


def expected_use(soft: SoftPlan, i: int) -> torch.Tensor:
    """The expected number of uses of each concept of type `i` at the slots where plans have one: (V_i,), floating
    point."""
    log_probs = soft.log_probs[i][..., :-1]
    alive = soft.ids[:, i, : log_probs.shape[1]] >= 0
    return (log_probs.softmax(-1) * alive[..., None]).sum((0, 1))


def hard_use(plan: torch.Tensor, i: int, size: int) -> torch.Tensor:
    """The number of uses of each of `size` concepts of type `i` in plans (B, n, Q) long: (V_i,) long."""
    ids = plan[:, i]
    return torch.bincount(ids[ids >= 0], minlength=size)


def signal_nll(
    model: nn.Module, batch: dict[str, torch.Tensor], plan: torch.Tensor | SoftPlan, scored: torch.Tensor
) -> torch.Tensor:
    """NLL of the signal y(X): each token is predicted from the plan and its position, without the tokens before it.

    Args:
        model: a causal LM with a planner, wrapped or not.
        batch: as of `PlannerCollator`.
        plan: plans (B, n, Q) long, or a `SoftPlan`.
        scored (B, T): bool; tokens that count.

    Returns:
        The sum over the tokens that count, a scalar in nats, floating point.
    """
    ids = batch["input_ids"]
    nothing_read = torch.ones_like(ids, dtype=torch.bool)
    nll = text_nll(model, executor_prefix(model, plan), ids, batch["attention_mask"], nothing_read)
    return (nll * scored).sum()


def mean_entropy(log_probs: list[torch.Tensor], opens: list[torch.Tensor]) -> torch.Tensor:
    """Mean entropy in nats of all types' predictions.

    Args:
        log_probs: for each type (B, J_i, V_i + 1), floating point.
        opens: for each type (B, J_i) bool; predictions that count.

    Returns:
        A scalar, floating point.
    """
    total = sum((torch.special.entr(x.exp()).sum(-1) * open_).sum() for x, open_ in zip(log_probs, opens))
    return total / sum(open_.sum() for open_ in opens)


def plan_predictions(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    plan: torch.Tensor,
    watch: Callable[[torch.Tensor], None] = lambda _: None,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """The planner's predictions for given plans, in one pass with gradients.

    Args:
        model: a causal LM with a planner, wrapped or not.
        input_ids, attention_mask (B, U): long; what the planner reads.
        plan (B, n, Q): long.
        watch: called with each type's logits (B, quota_i, V_i + 1).

    Returns:
        log p(plan | text) (B,); for each type log-probabilities (B, quota_i, V_i + 1) with gradients, floating point;
        and for each type (B, quota_i) bool, which predictions count: at each concept, and at the end if the type is
        shorter than its quota.
    """
    embeds = concept_embeds(backbone_of(model), plan)
    every, opens = [], []
    total = torch.zeros(len(plan), device=plan.device)
    for i, logits in enumerate(teacher_forced(model, input_ids, attention_mask, embeds, plan >= 0)):
        watch(logits)
        log_probs = logits.log_softmax(-1)
        ids = plan[:, i, : logits.shape[1]]
        chosen = log_probs.gather(-1, ids.where(ids >= 0, logits.shape[2] - 1)[..., None])[..., 0]
        open_ = torch.arange(logits.shape[1], device=plan.device) <= plan_lengths(plan)[:, i, None]
        total = total + (chosen * open_).sum(1)
        every.append(log_probs)
        opens.append(open_)
    return total, every, opens


@torch.no_grad()
def expected_and_chosen(
    model: nn.Module, log_probs: list[torch.Tensor], plan: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Expected and chosen codewords of given plans.

    The expected codeword is that of a sample at this temperature, which is `SoftPlan.soft` without noise. Values are
    arbitrary where there is no concept.

    Args:
        model: a causal LM with a planner, wrapped or not.
        log_probs: for each type (B, quota_i, V_i + 1), as of `plan_predictions`.
        plan (B, n, Q): long.
        temperature: of the softmax.

    Returns:
        Expected and chosen codewords, (B, n, Q, d) each, floating point.
    """
    head = backbone_of(model).unified_head
    hard = concept_embeds(backbone_of(model), plan)
    soft = torch.zeros_like(hard)
    for i, type_log_probs in enumerate(log_probs):
        shares = (type_log_probs[..., :-1] / temperature).softmax(-1).to(hard.dtype)
        soft[:, i, : shares.shape[1]] = shares @ head.concepts(i).to(hard.dtype)
    return soft, hard


class UsageAverage(nn.Module):
    """Moving average over steps of how often the concepts of each type are used.

    It spans about `window` concepts per codeword. A step with more concepts is used alone. A shorter average says
    little: a confident planner cannot use 4,096 codewords in 100 concepts. A longer one is out of date and holds the
    planner back.

    Args:
        sizes: V_i, the number of concepts of each type.
        window: number of concepts per codeword.

    Attributes:
        window: as above.
        average_i: (V_i,) float32 for each type i; the weights of its steps sum to `weight_i`.
    """

    def __init__(self, sizes: list[int], window: float):
        super().__init__()
        self.window = window
        for i, size in enumerate(sizes):
            self.register_buffer(f"average_{i}", torch.zeros(size))
            self.register_buffer(f"weight_{i}", torch.zeros(()))

    def share(self, i: int, use: torch.Tensor | None = None) -> torch.Tensor:
        """Shares of the concepts of type `i`, with `use` as the newest step.

        The value is that of the average. The gradient is that of the newest step alone, in full; otherwise it would
        shrink as the window grows.

        Args:
            i: index of the type.
            use (V_i,): floating point; uses in the newest step; None: only the average.

        Returns:
            (V_i,) float32 that sums to 1; 0 before anything was used.
        """
        average, weight = getattr(self, f"average_{i}"), getattr(self, f"weight_{i}")
        if use is None:
            return average / weight.clamp(min=torch.finfo(weight.dtype).tiny)
        now, part = _share(use.float()), self._part(use)
        average, weight = average.to(now.device), weight.to(now.device)
        mixed = ((1 - part) * average + part * now.detach()) / ((1 - part) * weight + part)
        return mixed + (now - now.detach())

    def _part(self, use: torch.Tensor) -> torch.Tensor:
        """The weight of the newest step in the average."""
        return (use.detach().sum().float() / (self.window * len(use))).clamp(max=1)

    def loss(self, uses: list[torch.Tensor]) -> torch.Tensor:
        """KL(share || uniform) in nats, averaged over types; a scalar. Types without any use contribute 0.

        Args:
            uses: (V_i,) floating point for each type; uses in this step.
        """
        terms = [
            usage_kl_to_uniform(self.share(i, use)) if use.detach().sum() > 0 else use.sum()
            for i, use in enumerate(uses)
        ]
        return torch.stack(terms).mean()

    @torch.no_grad()
    def update(self, uses: list[torch.Tensor]) -> None:
        """Update the average after a step, with the uses (V_i,) of all micro-batches and processes for each type."""
        for i, use in enumerate(uses):
            if use.sum() > 0:
                part = self._part(use)
                for name, new in (("average", _share(use.float())), ("weight", torch.ones(()))):
                    getattr(self, f"{name}_{i}").mul_(1 - part).add_(part * new)

    def perplexity(self, i: int) -> float:
        """Perplexity of the average of type `i`: 1 if one concept takes all uses, V_i if all are used equally, 0 before
        any use."""
        share = self.share(i)
        return float(torch.special.entr(share).sum().exp()) if share.any() else 0.0


def _share(use: torch.Tensor) -> torch.Tensor:
    use = use + torch.finfo(use.dtype).tiny  # log 0 has no gradient
    return use / use.sum()
