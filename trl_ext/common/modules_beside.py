"""Training of modules beside the model, such as a critic, where an engine has taken over the model's optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from .gradients import average_gradients


class OptimizerBeside:
    """An optimizer of modules that every process holds whole, beside a model whose optimizer FSDP2 or DeepSpeed shards.

    It is of the trainer's kind and follows the trainer's schedule.

    Attributes:
        optimizer: the torch optimizer.
    """

    def __init__(self, trainer: Trainer, groups: Iterable[dict[str, Any]]):
        """
        Args:
            trainer: gives the kind of optimizer and the schedule.
            groups: parameter groups, each with its learning rate.
        """
        kind, settings = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
        self._trainer = trainer
        self.optimizer: torch.optim.Optimizer = kind(list(groups), **settings)
        self._rates = [group["lr"] for group in self.optimizer.param_groups]
        self._first = [group["lr"] for group in trainer.optimizer.param_groups]  # before the schedule begins

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def step(self, mean: Callable[[torch.Tensor], torch.Tensor], max_norm: float | None = None) -> None:
        """Average the gradients over processes, clip them, take a step, and remove them.

        Args:
            mean: returns the mean of a tensor over processes.
            max_norm: the bound of the gradients' norm; None or 0: none.
        """
        average_gradients(self.parameters, mean)
        if max_norm:
            nn.utils.clip_grad_norm_(self.parameters, max_norm)
        share = self._share()
        for group, rate in zip(self.optimizer.param_groups, self._rates, strict=True):
            group["lr"] = rate * share
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _share(self) -> float:
        """This step's share of the initial learning rate."""
        schedule = self._trainer.lr_scheduler
        if isinstance(schedule, LambdaLR):
            return schedule.lr_lambdas[0](schedule.last_epoch)
        groups = zip(self._trainer.optimizer.param_groups, self._first)
        return next((group["lr"] / first for group, first in groups if first), 1.0)
