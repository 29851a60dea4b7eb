"""For losses of several forwards: with FSDP2 the model is one unit, and the loss runs within its forward."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from trl.models.utils import _ForwardRedirection

from patches.fsdp2_one_unit import one_unit

from . import mixin_bases


def _check_dtypes(model: nn.Module) -> None:
    """Raise a ValueError if trained weights have several dtypes. Mixed precision would make all of them float32."""
    first: dict[torch.dtype, str] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            first.setdefault(parameter.dtype, name)
    if len(first) > 1:
        (one, here), (other, there), *_ = first.items()
        raise ValueError(
            f"FSDP2 needs one dtype for all trained weights here, but {here} is {one} and {there} is {other}: set "
            "mixed_precision: bf16 for accelerate (bf16=True), which trains in float32, or load the model in float32"
        )


@contextlib.contextmanager
def _keeping_ties(model: nn.Module) -> Iterator[None]:
    """Let `model.tie_weights` tie what is tied now. transformers' own fails if PEFT has wrapped the embeddings.

    accelerate calls it after it has moved the model to the meta device, which unties weights.
    """
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    tied = [some for some in names.values() if len(some) > 1]

    def tie_weights() -> None:
        for first, *others in tied:
            for name in others:
                module, _, own = name.rpartition(".")
                setattr(model.get_submodule(module), own, model.get_parameter(first))

    vars(model)["tie_weights"] = tie_weights
    try:
        yield
    finally:
        del vars(model)["tie_weights"]


class OneUnitMixin(mixin_bases.Trainer):
    """Put it before a Trainer class. See `patches.fsdp2_one_unit` for the reason.

    Each process then holds all weights from the forward to the end of the backward. Optimizer states, and weights between
    steps, are sharded.

    Attributes:
        _one_unit: whether this run's loss needs it.
    """

    _one_unit = True

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        if not self._one_unit:
            return super()._prepare_for_training(*args, **kwargs)
        if self.accelerator.is_fsdp2 and self.accelerator.mixed_precision == "no":
            _check_dtypes(self.model)
        with one_unit(self.model), _keeping_ties(self.model):
            return super()._prepare_for_training(*args, **kwargs)

    def _within_forward(self, model: nn.Module, work: Callable[..., Any], *args: Any) -> Any:
        """Call `work(model, *args)`; with FSDP2 within the model's forward, where the weights are gathered.

        Its result must have the tensors that gradients come from.
        """
        if not self._one_unit or not isinstance(model, FSDPModule):
            return work(model, *args)

        def inside(*rest: Any) -> Any:
            # The forwards of the loss are part of this one. So FSDP2 shall do nothing for them, as when it recomputes a
            # forward in the backward
            before, state._training_state = state._training_state, TrainingState.PRE_BACKWARD
            try:
                return work(model, *rest)
            finally:
                state._training_state = before

        # Losses and log-probabilities keep their dtype, which mixed precision would make that of the weights
        state, policy = model._get_fsdp_state(), model._get_fsdp_state()._mp_policy
        state._mp_policy = dataclasses.replace(policy, output_dtype=None)
        try:
            return _ForwardRedirection()(model, model, inside, *args)
        finally:
            state._mp_policy = policy
