"""Training of modules beside the model, such as a critic: by the trainer's optimizer, or by one of their own where an
engine has taken over the trainer's."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.utils import broadcast
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer

from . import mixin_bases
from .gradients import average_gradients


def parameter_groups(trainer: Trainer, module: nn.Module, rate: float | None = None) -> list[dict[str, Any]]:
    """The parameter groups of a module, with the weight decay that the trainer gives to a model's.

    Args:
        trainer: gives the decay, and which parameters have it.
        module: the module.
        rate: the learning rate; None: the trainer's.
    """
    decayed = set(trainer.get_decay_parameter_names(module))
    rate = trainer.args.learning_rate if rate is None else rate
    groups = []
    for decays in (True, False):
        params = [p for name, p in module.named_parameters() if (name in decayed) == decays]
        groups.append({"params": params, "lr": rate, "weight_decay": trainer.args.weight_decay if decays else 0.0})
    return groups


@torch.no_grad()
def from_first_process(tensors: Iterable[torch.Tensor]) -> None:
    """Give parameters or buffers the values that they have in the first process, as DDP does for a model's."""
    for tensor in tensors:
        tensor.copy_(broadcast(tensor.data))


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


class ModulesBesideMixin(mixin_bases.Trainer):
    """For trainers that train modules beside the model, such as a critic."""

    _optimizer_beside: OptimizerBeside | None = None
    """The optimizer of modules beside a model that an engine shards."""

    def _modules_beside(self) -> dict[str, nn.Module]:
        """Modules that are trained beside the model, by the name of their folder in a checkpoint.

        Each has `save_pretrained` and writes files that `saved_weights` can read. Modules attached to the model are not
        listed.
        """
        return {}

    def _sharded(self) -> bool:
        """Whether FSDP or DeepSpeed averages gradients and shards the optimizer."""
        return self.is_deepspeed_enabled or self.is_fsdp_enabled

    def _mean(self, x: torch.Tensor) -> torch.Tensor:
        """The mean of a tensor over processes."""
        return self.accelerator.reduce(x, "mean")

    def _train_beside(self, optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> bool:
        """Let the trainer's optimizer train further parameters too, or one beside it if an engine shards the model's.

        Args:
            optimizer: the trainer's.
            groups: parameter groups, each with its learning rate.

        Returns:
            False if the optimizer has them already.
        """
        known = {p for group in optimizer.param_groups for p in group["params"]}
        if any(p in known for group in groups for p in group["params"]):
            return False
        if self._sharded():
            self._optimizer_beside = self._optimizer_beside or OptimizerBeside(self, groups)
        else:
            for group in groups:
                optimizer.add_param_group(group)
        return True

    def _end_step_beside(self, parameters: Iterable[nn.Parameter], max_norm: float | None = None) -> None:
        """After the last backward of a step: average gradients over processes; an optimizer beside takes its step.

        Args:
            parameters: those of `_train_beside`.
            max_norm: what such an optimizer clips to; None or 0: it does not.
        """
        if self._optimizer_beside is not None:
            self._optimizer_beside.step(self._mean, max_norm)
        elif self.accelerator.num_processes > 1:
            average_gradients(list(parameters), self._mean)
