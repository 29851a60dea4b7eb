"""What micro-batches and processes know of a step, or batches of an evaluation, added up before anything is divided.

A mean of micro-batches' means weighs a token by the company it is in, and a perplexity of few concepts is lower than that
of all of them. So numerators and denominators are added, and figures are made of the sums.
"""

from collections.abc import Callable
from typing import Any

import torch

from . import mixin_bases


class Sums:
    """Named sums of one process, in fp64 on the device they come from; nothing waits for it before `pop`."""

    def __init__(self):
        self._found: dict[str, torch.Tensor] = {}
        self._means: set[str] = set()

    @torch.no_grad()
    def add(self, **sums: torch.Tensor) -> None:
        """Add to what is known, of any shape. Every process adds to the same names in the same order."""
        for name, value in sums.items():
            self._found[name] = self._found.get(name, 0) + value.detach().double()

    def weigh(self, means: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """As `add`, of means: each a total and what it is to be divided by, both ()."""
        for name, (total, count) in means.items():
            self._means.add(name)
            self.add(**{name: torch.stack([total.detach().double(), count.detach().double()])})

    def pop(self, reduce: Callable[[torch.Tensor], torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """What was added since the last time, by all processes together.

        Args:
            reduce: a tensor's sum over processes.

        Returns:
            Sums on the CPU, and means; of a mean over nothing there is none.
        """
        found, means, self._found, self._means = self._found, self._means, {}, set()
        if not found:
            return {}, {}
        together = reduce(torch.cat([x.flatten() for x in found.values()])).cpu()
        sums = dict(zip(found, together.split([x.numel() for x in found.values()])))
        divided = {name: sums.pop(name).tolist() for name in list(sums) if name in means}
        return sums, {name: total / count for name, (total, count) in divided.items() if count}


class ExactMeans(mixin_bases.Trainer):
    """Put before a trainer of TRL's, which logs the mean of the numbers that micro-batches gave it: a token of a short one
    then counts for more than a token of a long one. Figures that are added here are means over everything since the last
    log."""

    _figures: Sums | None = None

    def _add_to_mean(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        """Log `name` as the sum of all totals over the sum of all counts, in all micro-batches and processes; not at all
        while the counts are 0. Every process must add the same names.

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
