"""Exact means of metrics over micro-batches, processes, or batches of an evaluation.

The mean of micro-batch means gives tokens of short batches more weight, and the perplexity of few concepts is below
that of all. Therefore numerators and denominators are summed first and divided once.
"""

from collections.abc import Callable
from typing import Any

import torch

from . import mixin_bases


class Sums:
    """Named sums of one process, in float64 on the device of the values. It does not wait for the device before `pop`."""

    def __init__(self):
        self._found: dict[str, torch.Tensor] = {}
        self._means: set[str] = set()

    @torch.no_grad()
    def add(self, **sums: torch.Tensor) -> None:
        """Add tensors of any shape to the sums. Every process must add the same names in the same order."""
        for name, value in sums.items():
            self._found[name] = self._found.get(name, 0) + value.detach().double()

    def weigh(self, means: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Add means. Each is a pair of scalars: a total, and the count to divide it by."""
        for name, (total, count) in means.items():
            self._means.add(name)
            self.add(**{name: torch.stack([total.detach().double(), count.detach().double()])})

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Sum over all processes what was added since the last call, and reset.

        Args:
            reduce: returns the sum of a tensor over processes.

        Returns:
            The sums (flattened, float64, on the CPU) and the means. A mean with a count of 0 is left out.
        """
        found, means, self._found, self._means = self._found, self._means, {}, set()
        if not found:
            return {}, {}
        together = reduce(torch.cat([x.flatten() for x in found.values()])).cpu()
        sums = dict(zip(found, together.split([x.numel() for x in found.values()])))
        divided = {name: sums.pop(name).tolist() for name in list(sums) if name in means}
        return sums, {name: total / count for name, (total, count) in divided.items() if count}


class ExactMeans(mixin_bases.Trainer):
    """Log exact means from a TRL trainer. Put it before the trainer.

    TRL logs the mean of the numbers of the micro-batches, in which a token of a short micro-batch weighs more than a
    token of a long one. Metrics that are added here are means over everything since the last log.
    """

    _figures: Sums | None = None

    def _add_to_mean(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        """Log `name` as the sum of all totals over the sum of all counts, over micro-batches and processes.

        Nothing is logged while the counts are 0. Every process must add the same names.

        Args:
            total, count: scalars of this micro-batch on this process.
        """
        if self._figures is None:
            self._figures = Sums()
        self._figures.weigh({name: (total, count)})

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._figures is not None:
            _, means = self._figures.pop(lambda x: self.accelerator.reduce(x, "sum"))
            metrics = self._metrics["train" if self.model.training else "eval"]
            metrics.update({name: [value] for name, value in means.items()})
        super().log(logs, *args, **kwargs)
