"""Terms beside the executor's cross-entropy, by row; means over rows are the trainer's."""

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
    """(B,), 1 - cos(e_soft, sg(e_hard)), the mean over a plan's concepts; 0 for an empty plan."""
    alive = soft.ids >= 0
    cosine = F.cosine_similarity(soft.soft.float(), soft.hard.detach().float(), dim=-1)
    return ((1 - cosine) * alive).sum((1, 2)) / alive.sum((1, 2)).clamp(min=1)


def loss_eos(soft: SoftPlan, quotas: list[int]) -> torch.Tensor:
    """(B,), -log p(<EOS>) at the last slot of types that ran into their quota without an end, the mean over types."""
    lengths = plan_lengths(soft.ids)
    total = torch.zeros(len(lengths), device=lengths.device)
    for i, quota in enumerate(quotas):
        if soft.log_probs[i].shape[1] == quota:  # some row went so far
            total = total - torch.where(lengths[:, i] == quota, soft.log_probs[i][:, -1, -1], 0)
    return total / len(quotas)


def expected_use(soft: SoftPlan, i: int) -> torch.Tensor:
    """(V_i,), how often each concept of type `i` is expected where plans have one."""
    log_probs = soft.log_probs[i][..., :-1]
    alive = soft.ids[:, i, : log_probs.shape[1]] >= 0
    return (log_probs.softmax(-1) * alive[..., None]).sum((0, 1))


def hard_use(plan: torch.Tensor, i: int, size: int) -> torch.Tensor:
    """(V_i,), how often each of `size` concepts of type `i` is in plans (B, n, Q)."""
    ids = plan[:, i]
    return torch.bincount(ids[ids >= 0], minlength=size)


def signal_nll(
    model: nn.Module, batch: dict[str, torch.Tensor], plan: torch.Tensor | SoftPlan, scored: torch.Tensor
) -> torch.Tensor:
    """The signal y(X) that is extracted from a text and predicted from its plan: every word, by its place, without the
    words before it. A sum over the tokens that count, nats.

    Args:
        batch: as of `PlannerCollator`. scored (B, T) bool: tokens that count.
    """
    ids = batch["input_ids"]
    nothing_read = torch.ones_like(ids, dtype=torch.bool)
    nll = text_nll(model, executor_prefix(model, plan), ids, batch["attention_mask"], nothing_read)
    return (nll * scored).sum()


def mean_entropy(log_probs: list[torch.Tensor], opens: list[torch.Tensor]) -> torch.Tensor:
    """Of all types' predictions (B, J_i, V_i + 1), nats, over those that were made (B, J_i)."""
    total = sum((torch.special.entr(x.exp()).sum(-1) * open_).sum() for x, open_ in zip(log_probs, opens))
    return total / sum(open_.sum() for open_ in opens)


def plan_predictions(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    plan: torch.Tensor,
    watch: Callable[[torch.Tensor], None] = lambda _: None,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """What the planner says about plans (B, n, Q) that are given, in one pass with gradients.

    Args:
        watch: called with each type's logits (B, quota_i, V_i + 1).

    Returns:
        log p(plan | text) (B,); of each type log-probabilities (B, quota_i, V_i + 1), with gradients, and where they were
        asked for (B, quota_i) bool: at each concept, and at the end where the type is shorter than its quota.
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
    """Codewords (B, n, Q, d) of plans (B, n, Q) that were found: expected of a sample at this temperature, which is
    `SoftPlan.soft` without its noise, and chosen; any where there is no concept.

    Args:
        log_probs: of each type (B, quota_i, V_i + 1), as of `plan_predictions`.
    """
    head = backbone_of(model).unified_head
    hard = concept_embeds(backbone_of(model), plan)
    soft = torch.zeros_like(hard)
    for i, type_log_probs in enumerate(log_probs):
        shares = (type_log_probs[..., :-1] / temperature).softmax(-1).to(hard.dtype)
        soft[:, i, : shares.shape[1]] = shares @ head.concepts(i).to(hard.dtype)
    return soft, hard


class UsageAverage(nn.Module):
    """Moving average over steps of how the concepts of each type are used: of about `window` concepts for each codeword. A
    step of so many stands for itself.

    Fewer say little: a planner that is sure of itself cannot use 4,096 codewords in 100 concepts. More are out of date, and
    hold a planner back that has moved on.

    Attributes:
        window: concepts for each codeword.
        average: of each type (V_i,), the weights of its steps adding up to `weight`.
    """

    def __init__(self, sizes: list[int], window: float):
        super().__init__()
        self.window = window
        for i, size in enumerate(sizes):
            self.register_buffer(f"average_{i}", torch.zeros(size))
            self.register_buffer(f"weight_{i}", torch.zeros(()))

    def share(self, i: int, use: torch.Tensor | None = None) -> torch.Tensor:
        """(V_i,) that adds up to 1 (0 before anything was used), with `use` (V_i,) as the newest step.

        Its value is the average's, its gradient that of the newest step alone, in full: otherwise it would shrink as the
        memory grows.
        """
        average, weight = getattr(self, f"average_{i}"), getattr(self, f"weight_{i}")
        if use is None:
            return average / weight.clamp(min=torch.finfo(weight.dtype).tiny)
        now, part = _share(use.float()), self._part(use)
        average, weight = average.to(now.device), weight.to(now.device)
        mixed = ((1 - part) * average + part * now.detach()) / ((1 - part) * weight + part)
        return mixed + (now - now.detach())

    def _part(self, use: torch.Tensor) -> torch.Tensor:
        """Of the average, what is the newest step's."""
        return (use.detach().sum().float() / (self.window * len(use))).clamp(max=1)

    def loss(self, uses: list[torch.Tensor]) -> torch.Tensor:
        """KL(share || uniform), nats, the mean over types; of a type that is not used nothing is asked."""
        terms = [
            usage_kl_to_uniform(self.share(i, use)) if use.detach().sum() > 0 else use.sum()
            for i, use in enumerate(uses)
        ]
        return torch.stack(terms).mean()

    @torch.no_grad()
    def update(self, uses: list[torch.Tensor]) -> None:
        """After a step, of all its micro-batches and processes."""
        for i, use in enumerate(uses):
            if use.sum() > 0:
                part = self._part(use)
                for name, new in (("average", _share(use.float())), ("weight", torch.ones(()))):
                    getattr(self, f"{name}_{i}").mul_(1 - part).add_(part * new)

    def perplexity(self, i: int) -> float:
        """Of the average: 1 where one concept is all, V_i where all are used alike; 0 before any was."""
        share = self.share(i)
        return float(torch.special.entr(share).sum().exp()) if share.any() else 0.0


def _share(use: torch.Tensor) -> torch.Tensor:
    use = use + torch.finfo(use.dtype).tiny  # log 0 has no gradient
    return use / use.sum()
