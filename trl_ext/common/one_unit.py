"""For losses of several forwards: with FSDP2 the model is one unit, and the loss runs within its forward."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.distributed.fsdp import FSDPModule
from trl.models.utils import _ForwardRedirection

from patches.fsdp2_one_unit import one_unit

from . import mixin_bases


class OneUnitMixin(mixin_bases.Trainer):
    """Put it before a Trainer class. See `patches.fsdp2_one_unit` for the reason.

    Each process then holds all weights from the forward to the end of the backward. Optimizer states, and weights between
    steps, are sharded.
    """

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        with one_unit(self.model):
            return super()._prepare_for_training(*args, **kwargs)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:  # which prepares a model that was not trained
        with one_unit(self.model):
            return super().evaluation_loop(*args, **kwargs)

    def _within_forward(self, model: nn.Module, work: Callable[..., Any], *args: Any) -> Any:
        """Call `work(model, *args)`; with FSDP2 within the model's forward, where the weights are gathered.

        Its result must have the tensors that gradients come from.
        """
        if not isinstance(model, FSDPModule):
            return work(model, *args)
        return _ForwardRedirection()(model, model, lambda *rest: work(model, *rest), *args)
