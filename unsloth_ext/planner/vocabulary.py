"""The layout of the planner's table of rows, and the format of plans (ours).

    BOS, PLAN, NULL, DROPPED | SEP_1 .. SEP_n | V_1, EOS_1 | V_2, EOS_2 | ... | queries of type 1 | ...

A type's concepts and its end are adjacent, so its logits come from one slice without rows of other types. Queries exist
with `multi_token` only.

A plan is a tensor (B, n, Q) long. Each type has its concepts 0 .. V_i - 1 from the front, and -1 after them. Q is the
largest quota.
"""

from itertools import accumulate, pairwise

import torch

from .config import PlannerConfig


BOS, PLAN, NULL, DROPPED = range(4)


class PlannerVocabulary:
    """Rows of the table. Types are counted from 0."""

    def __init__(self, config: PlannerConfig):
        self.seps = 4
        outputs = [kind.num_concepts + 1 for kind in config.types]
        queries = [kind.quota if config.multi_token else 0 for kind in config.types]
        starts = list(accumulate([*outputs, *queries], initial=self.seps + len(config.types)))
        spans = [slice(start, stop) for start, stop in pairwise(starts)]
        self._outputs, self._queries = spans[: len(outputs)], spans[len(outputs) :]
        self.size = starts[-1]

    def sep(self, i: int) -> int:
        """Return the row of the separator of type `i`."""
        return self.seps + i

    def outputs(self, i: int) -> slice:
        """Return the rows of the concepts of type `i` and its end, which is last."""
        return self._outputs[i]

    def concepts(self, i: int) -> slice:
        """Return the rows of the concepts of type `i`."""
        return slice(self._outputs[i].start, self._outputs[i].stop - 1)

    def eos(self, i: int) -> int:
        """Return the row of the end of type `i`."""
        return self._outputs[i].stop - 1

    def queries(self, i: int) -> slice:
        """Return the rows of the queries of type `i`."""
        return self._queries[i]


def plan_lengths(plan: torch.Tensor) -> torch.Tensor:
    """Return the number of concepts of each type (B, n) long in plans (B, n, Q) long."""
    return (plan >= 0).sum(-1)


def check_plan(plan: torch.Tensor, config: PlannerConfig) -> None:
    """Raise a ValueError if a tensor is no plan under these settings."""
    shape = (len(config.types), config.max_quota)
    if plan.dim() != 3 or tuple(plan.shape[1:]) != shape or plan.dtype != torch.long:
        raise ValueError(
            f"plan {tuple(plan.shape)} {plan.dtype}: must be (rows, {shape[0]}, {shape[1]}) torch.int64, by the types and "
            "the largest quota"
        )
    here = plan >= 0
    quotas = torch.tensor([kind.quota for kind in config.types], device=plan.device)
    sizes = torch.tensor([kind.num_concepts for kind in config.types], device=plan.device)
    slots = torch.arange(shape[1], device=plan.device)
    wrong = (plan < -1) | (plan >= sizes[:, None]) | (here & (slots >= quotas[:, None]))
    wrong[..., 1:] |= here[..., 1:] & ~here[..., :-1]
    if wrong.any():
        row, i, j = wrong.nonzero()[0].tolist()
        kind = config.types[i]
        raise ValueError(
            f"plan[{row}, {i}, {j}]={plan[row, i, j].item()}: type {kind.name!r} has concepts 0 to "
            f"{kind.num_concepts - 1}, at most {kind.quota} of them, and -1 after the last"
        )
