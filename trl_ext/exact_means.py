"""Means that are logged exactly, over everything since the last log. TRL averages what it was given, a number for each
micro-batch, and so counts a token of a short micro-batch more than one of a long one."""

from typing import Any

import torch


class ExactMeans:
    """Put before a trainer of TRL's."""

    _mean_sums: dict[str, torch.Tensor] | None = None

    def _add_to_mean(self, name: str, total: torch.Tensor, count: torch.Tensor) -> None:
        """Log `name` as the sum of all totals over the sum of all counts, in all micro-batches and processes.

        Every process must add the same names. One whose count stays 0 is not logged.

        Args:
            total, count: scalars of this micro-batch on this process.
        """
        if self._mean_sums is None:
            self._mean_sums = {}
        sums = torch.stack([total.detach().float(), count.detach().float()])
        self._mean_sums[name] = self._mean_sums.get(name, 0) + sums

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._mean_sums:
            sums = self.accelerator.reduce(torch.stack(list(self._mean_sums.values())), "sum").tolist()
            metrics = self._metrics["train" if self.model.training else "eval"]
            for name, (total, count) in zip(self._mean_sums, sums, strict=True):
                if count:
                    metrics[name] = [total / count]
            self._mean_sums = None
        super().log(logs, *args, **kwargs)
