"""Where everything stands in the table of new rows, and what a plan is.

    BOS, PLAN, NULL, DROPPED | SEP_1 .. SEP_n | V_1, EOS_1 | V_2, EOS_2 | ... | queries of type 1 | ...

A type's concepts and its end are neighbours, so its logits come from one slice: no other type's row is in it. Queries are
there with `multi_token` only.

A plan is a tensor (B, n, Q) long of concepts 0 .. V_i - 1, of each type from the front, -1 behind its end; Q is the largest
quota.
"""

from itertools import accumulate, pairwise

import torch

from .config import PlannerConfig


BOS, PLAN, NULL, DROPPED = range(4)


class PlannerVocabulary:
    """Rows of the table. Types count from 0."""

    def __init__(self, config: PlannerConfig):
        self.seps = 4
        outputs = [kind.num_concepts + 1 for kind in config.types]
        queries = [kind.quota if config.multi_token else 0 for kind in config.types]
        starts = list(accumulate([*outputs, *queries], initial=self.seps + len(config.types)))
        spans = [slice(start, stop) for start, stop in pairwise(starts)]
        self._outputs, self._queries = spans[: len(outputs)], spans[len(outputs) :]
        self.size = starts[-1]

    def sep(self, i: int) -> int:
        return self.seps + i

    def outputs(self, i: int) -> slice:
        """Concepts of type `i` and, last, its end."""
        return self._outputs[i]

    def concepts(self, i: int) -> slice:
        return slice(self._outputs[i].start, self._outputs[i].stop - 1)

    def eos(self, i: int) -> int:
        return self._outputs[i].stop - 1

    def queries(self, i: int) -> slice:
        return self._queries[i]


def plan_lengths(plan: torch.Tensor) -> torch.Tensor:
    """(B, n) long: concepts of each type in plans (B, n, Q)."""
    return (plan >= 0).sum(-1)


def check_plan(plan: torch.Tensor, config: PlannerConfig) -> None:
    """Raises a ValueError if a tensor is no plan under these settings."""
    shape = (len(config.types), config.max_quota)
    if plan.dim() != 3 or tuple(plan.shape[1:]) != shape or plan.dtype != torch.long:
        raise ValueError(
            f"plan {tuple(plan.shape)} {plan.dtype}: needs (rows, {shape[0]}, {shape[1]}) torch.int64, for the types and "
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
            f"{kind.num_concepts - 1}, at most {kind.quota} of them, and -1 behind the last"
        )
