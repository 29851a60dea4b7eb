"""Base trainer for SFT with another loss per trained token.

TRL's `compute_loss` lets the model score the trained tokens, sums the returned `log_probs`, and divides by the number
of trained tokens of the whole step, over micro-batches and processes. Both distillations return their own score and
leave the rest (scaling, the router loss of a mixture of experts, metrics, evaluation) to TRL.
"""

import functools
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ..common.checkpointing import SafeCheckpointMixin
from ..common.model_loading import default_args, on_unsloths_trainer


class PerTokenTrainer(SafeCheckpointMixin, SFTTrainer):
    """SFTTrainer whose loss per token comes from `_score`. Same constructor as `SFTTrainer`.

    Raises:
        ValueError: in the constructor, if TRL would compute the loss in another way: `compute_loss_func`, context or
            sequence parallelism, or Unsloth's trainer.
    """

    _config_class: type[SFTConfig]

    def __init__(self, model: Any, args: SFTConfig | None = None, *others: Any, **keywords: Any):
        args = self._checked(model, args)
        if on_unsloths_trainer():
            raise ValueError(
                "Unsloth's trainer, which has replaced TRL's, computes the loss in its own way: do not import unsloth"
            )
        super().__init__(model, args, *others, **keywords)
        if self._is_sft:
            return
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func: the distillation loss replaces it; leave it unset")
        parallel = self.accelerator.parallelism_config
        if parallel is not None and (parallel.cp_enabled or parallel.sp_enabled):
            raise ValueError("parallelism_config: each process needs whole sequences; set cp_size and sp_size to 1")

    @property
    def _is_sft(self) -> bool:
        """Whether the loss is the parent's, unchanged."""
        return False

    def _checked(self, model: Any, args: SFTConfig | None) -> SFTConfig:
        args = default_args(model, self._config_class, self._name) if args is None else args
        if not isinstance(args, self._config_class):
            raise ValueError(f"args is a {type(args).__name__}; {self._name} needs a {self._config_class.__name__}")
        return args

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self._is_sft:
            model = functools.partial(self._call, model, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    def _call(self, model, num_items_in_batch, fused_lm_head: bool = False, **inputs: Any) -> Any:
        if not fused_lm_head:  # the user asked for logits
            return model(**inputs)
        return self._score(model, num_items_in_batch, **inputs)

    def _score(self, model, num_items_in_batch: torch.Tensor | None, **inputs: Any) -> FusedCausalLMOutput:
        """The output of a forward with these inputs, labels included. `log_probs` is minus the loss of each trained
        token."""
        raise NotImplementedError
