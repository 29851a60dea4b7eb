"""The losses of latent distillation: `w_student CE + w_teacher CE + w_codi L_CODI + w_kv L_KV + w_latent_ce CE_latent`.

L_CODI (arXiv 2502.21074; PCCoT uses it too) pulls the student's hidden state at the token that predicts the first
answer token towards the teacher's, in every layer. L_KV (KaVa, arXiv 2510.02312) pulls the keys and values of latent
tokens towards the ones kept of the teacher's trace.

Means and standard deviations are over the batch of all processes; `all_sum` sums a tensor over them. The mean of a
function's results over processes is the loss of the whole batch, because DDP averages gradients.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


LOSSES = {"smooth_l1": F.smooth_l1_loss, "l1": F.l1_loss, "mse": F.mse_loss}
STD_MODES = ("divide_loss", "normalize_states", "none")
STD_SCOPES = ("layer", "global", "token")
LATENT_TOKENS = ("spread", "first", "steps", "results")
OF_STEPS = LATENT_TOKENS[2:]  # with these, latent tokens belong to steps
LATENT_PASSES = ("all", "last")
AllSum = Callable[[torch.Tensor], torch.Tensor]


def alone(x: torch.Tensor) -> torch.Tensor:
    """`all_sum` for a single process."""
    return x


def masked_mean(values: torch.Tensor, mask: torch.Tensor, all_sum: AllSum = alone) -> torch.Tensor:
    """Mean over all processes of the values (...) where the broadcastable bool mask is set; a scalar."""
    mask = mask.expand_as(values)
    processes, count = all_sum(torch.stack([mask.new_ones((), dtype=torch.float32), mask.sum().float()]))
    return torch.where(mask, values, 0.0).sum() * processes / count.clamp(min=1)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, all_sum: AllSum = alone) -> torch.Tensor:
    """Mean next-token cross-entropy in nats.

    Args:
        logits (B, T, V): floating point.
        labels (B, T): long, -100 where there is no target.
        all_sum: sums a tensor over processes.

    Returns:
        A scalar, float32.
    """
    targets = labels[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return masked_mean(loss, targets != -100, all_sum)


def latent_targets(
    trace: torch.Tensor,
    mask: torch.Tensor,
    count: int,
    which: str,
    step_ends: torch.Tensor | None = None,
    per_step: int | None = None,
    result_starts: torch.Tensor | None = None,
) -> torch.Tensor:
    """The token of the written steps that each latent token stands for (LOTUS, arXiv 2606.31779).

    Args:
        trace (B, S): long, tokens of the steps from the first on.
        mask (B, S): which of them there are, from the first on.
        count: M, the number of latent tokens.
        which: where the steps have more tokens than M, `"spread"`: token floor(j K / M) of K for the j-th latent token;
            `"first"`: the first M. Shorter steps leave the last latent tokens without one. `"steps"`: each step has its own
            latent tokens, which stand for its first tokens. `"results"`: they stand for the first tokens of its result.
        step_ends (B, K): long, for `"steps"` and `"results"`: the number of tokens up to the end of each step; the last
            number is repeated for rows with fewer steps.
        per_step: for these two: the number of latent tokens of each step.
        result_starts (B, K): long, for `"results"`: the number of tokens up to the result of each step; that of all tokens
            for rows with fewer steps.

    Returns:
        (B, M) long; -100 where there is none.
    """
    lengths = mask.sum(1, keepdim=True)
    at = torch.arange(count, device=trace.device).expand(len(trace), count)
    there = at < lengths
    if which == "spread":
        at = torch.where(lengths > count, at * lengths // count, at)
    elif which in OF_STEPS:
        assert step_ends is not None and per_step is not None
        more = max(count // per_step - step_ends.shape[1], 0)  # steps that no row has
        ends = F.pad(step_ends, (1, more), value=0).cummax(1).values  # of these: the last end
        if which == "steps":
            starts = ends
        else:
            assert result_starts is not None
            starts = F.pad(result_starts, (0, more), value=trace.shape[1])
        step = torch.arange(count, device=trace.device) // per_step
        at = starts[:, step] + torch.arange(count, device=trace.device) % per_step
        there = at < ends[:, step + 1]
    padded = F.pad(trace, (0, max(count - trace.shape[1], 0)))
    return padded.gather(1, at.clamp(max=padded.shape[1] - 1)).masked_fill(~there, -100)


def latent_cross_entropy(
    head: Callable[[torch.Tensor], torch.Tensor],
    before: torch.Tensor,
    targets: torch.Tensor,
    all_sum: AllSum = alone,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy of the tokens that latent tokens stand for, read by the LM head (LOTUS, arXiv 2606.31779).

    The state one position before a latent token predicts its token, as in a written text. Logits of one pass are held at a
    time: they are computed again in the backward.

    Args:
        head: from hidden states (..., d) to logits (..., V).
        before (P, B, M, d): floating point, see `LatentState`.
        targets (B, M): long, -100 where there is none.
        all_sum: sums a tensor over processes.

    Returns:
        The mean over passes and targets in nats, and the share of targets that the last pass ranks first, over all
        processes; scalars, float32. The second has no gradient.
    """
    there = targets != -100

    def of(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = head(hidden).float()
        loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
        return loss, (logits.argmax(-1) == targets).float()

    found = [checkpoint(of, hidden, use_reentrant=False) for hidden in before]
    loss = masked_mean(torch.stack([loss for loss, _ in found]), there, all_sum)
    right, count = all_sum(torch.stack([(found[-1][1] * there).sum(), there.sum().float()]).detach())
    return loss, right / count.clamp(min=1)


def std_of(values: torch.Tensor, mask: torch.Tensor, all_sum: AllSum = alone) -> torch.Tensor:
    """Unbiased standard deviation over all processes of the values that a broadcastable mask selects; a float64 scalar,
    no gradient."""
    values, mask = values.detach().double(), mask.expand_as(values)
    count, total = all_sum(torch.stack([mask.sum().double(), torch.where(mask, values, 0.0).sum()]))
    mean = total / count.clamp(min=1)
    square = all_sum(torch.where(mask, values - mean, 0.0).square().sum())
    return (square / (count - 1).clamp(min=1)).sqrt().clamp(min=1e-12)


def codi_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    *,
    loss: str = "smooth_l1",
    std_mode: str = "divide_loss",
    std_scope: str = "layer",
    all_sum: AllSum = alone,
) -> torch.Tensor:
    """Distance between hidden states (CODI, arXiv 2502.21074).

    Args:
        student, teacher (L, B, d): floating point; one token per row, of each layer that counts. No gradient flows into
            the teacher.
        loss: `"smooth_l1"`, `"l1"` or `"mse"`.
        std_mode: `"divide_loss"`: divide the loss by the teacher's standard deviation (by its square for `"mse"`, whose
            unit is squared); `"normalize_states"`: divide both states by it; `"none"`.
        std_scope: standard deviation per `"layer"`, `"global"` over all layers, or per `"token"` (one row in one
            layer).
        all_sum: sums a tensor over processes.

    Returns:
        A scalar, float32.

    Raises:
        ValueError: the two have different shapes.
    """
    _check_shapes(student, teacher)
    teacher = teacher.detach()
    everything = torch.ones((), dtype=torch.bool, device=teacher.device)
    if std_mode == "none":
        std = 1.0
    elif std_scope == "token":
        std = teacher.float().std(dim=-1, keepdim=True).clamp(min=1e-12)
    elif std_scope == "global":
        std = std_of(teacher, everything, all_sum).float()
    else:
        std = torch.stack([std_of(layer, everything, all_sum) for layer in teacher]).float()[:, None, None]
    return masked_mean(_distance(student, teacher, loss, std_mode, std, squared=True), everything, all_sum)


def kv_loss(
    student: torch.Tensor,
    teacher: torch.Tensor,
    valid: torch.Tensor,
    *,
    loss: str = "smooth_l1",
    std_mode: str = "none",
    all_sum: AllSum = alone,
) -> torch.Tensor:
    """Distance between the keys (or values) of latent tokens and the ones kept of the teacher's trace (KaVa, arXiv
    2510.02312).

    Compute it for keys and for values and average.

    Args:
        student, teacher (L, B, Hkv, M, D): floating point; no gradient flows into the teacher.
        valid (B, M), or broadcastable to (L, B, Hkv, M): bool; slots that the teacher's trace fills.
        loss: `"smooth_l1"`, `"l1"` or `"mse"`.
        std_mode: `"none"`; or use the teacher's standard deviation per layer over the valid slots: `"divide_loss"`
            divides the loss by it, `"normalize_states"` divides both sides. The student's own is never used: the loss
            would ignore scale.
        all_sum: sums a tensor over processes.

    Returns:
        A scalar, float32.

    Raises:
        ValueError: the two have different shapes.
    """
    _check_shapes(student, teacher)
    teacher = teacher.detach()
    if valid.dim() == 2:
        valid = valid[None, :, None]
    mask = valid[..., None].expand_as(teacher)
    std = 1.0
    if std_mode != "none":
        layers = [std_of(t, m, all_sum) for t, m in zip(teacher, mask, strict=True)]
        std = torch.stack(layers).float()[:, None, None, None, None]
    return masked_mean(_distance(student, teacher, loss, std_mode, std), mask, all_sum)


def _check_shapes(student: torch.Tensor, teacher: torch.Tensor) -> None:
    if student.shape != teacher.shape:  # torch would broadcast the smaller one
        raise ValueError(
            f"the student's {tuple(student.shape)} and the teacher's {tuple(teacher.shape)} need one shape: the same "
            "layers, rows, heads and positions"
        )


def _distance(student, teacher, loss, std_mode, std, squared=False) -> torch.Tensor:
    student, teacher = student.float(), teacher.float()
    if std_mode == "normalize_states":
        return LOSSES[loss](student / std, teacher / std, reduction="none")
    return LOSSES[loss](student, teacher, reduction="none") / (std**2 if squared and loss == "mse" else std)
