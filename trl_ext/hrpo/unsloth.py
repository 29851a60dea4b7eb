"""HRPO on the GRPO trainer that Unsloth generates: its loss, its layout of log-probabilities, its configuration.

Unsloth's `compute_loss` calls `grpo_accumulated_loss`, whose forwards see only token ids in packed order. The patch of
that function passes the thinking states to them. Its log-probabilities are (B, C + W), where W is the largest number of
left pads: the completion of row i starts at column W - pads_i. Rollout, batch, optimizer, monitors and checkpoints are
HRPOMixin's.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import MISSING, fields
from typing import Any

import torch
from accelerate.utils import is_peft_model, set_seed
from peft import get_peft_model
from torch import nn
from transformers.utils import logging

import patches
from patches.grpo_accumulated_loss import NAME, thinking_batch, thinking_forwards
from unsloth_ext.common.unsloth_decoding import on_unsloth

from .config import HRPOArguments
from .trainer import HRPOMixin, _trace_in


logger = logging.get_logger(__name__)

OVERRIDDEN = (
    "compute_loss",
    "training_step",
    "_get_per_token_logps_and_entropies",
    "_generate_single_turn",
    "_generate_and_score_completions",
    "create_optimizer",
    "_clip_grad_norm",
)


class UnslothHRPOMixin(HRPOMixin):
    __doc__ = HRPOMixin.__doc__

    # -- construction -----------------------------------------------------------------------------------------------

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.thinking:
            self._check_live()

    def _check_vllm(self, args: Any) -> None:
        raise ValueError(
            "use_vllm=True: Unsloth's trainer asks the vLLM engine that Unsloth made when it loaded the model. It cannot "
            "think; set use_vllm=False, or train without importing unsloth"
        )

    def _check_soft(self) -> None:
        raise ValueError(
            f"thinking_source={self.hrpo.thinking_source!r}: Unsloth's loss computes log-probabilities of tokens only; "
            "train soft tokens without importing unsloth"
        )

    def _check_plain_vllm(self, args: Any) -> None:
        """Unsloth makes the engine, and checks it."""

    def _named(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Unsloth wraps the constructor in another signature; the class below has TRL's
        signature = inspect.signature(_base(type(self), "compute_loss").__init__)
        given = signature.bind_partial(self, *args).arguments
        return {**dict(list(given.items())[1:]), **kwargs}

    def _attach(self, given: dict[str, Any]) -> None:
        if not hasattr(given["model"], "for_training"):
            name = given["model"] if isinstance(given["model"], str) else type(given["model"]).__name__
            raise ValueError(
                f"model={name}: Unsloth's trainer needs a model that Unsloth has loaded; load it with "
                "unsloth_ext.FastThinkingModel.from_pretrained"
            )
        super()._attach(given)
        config = given.get("peft_config")
        if config is not None and not is_peft_model(given["model"]):  # Unsloth's trainer would ignore it
            set_seed(getattr(given.get("args"), "seed", 42))
            given["model"] = _with_adapter(
                given["model"], config, getattr(given.get("args"), "gradient_checkpointing", False)
            )
        beta = getattr(given.get("args"), "beta", 0.0)
        if beta and any("lora_B" in name and p.any() for name, p in given["model"].named_parameters()):
            logger.warning(
                f"HRPO: this adapter was trained before, and beta={beta} pulls it to the base model without it, the KL "
                "reference of Unsloth's trainer (TRL's is a copy of the adapter). To pull it to its start instead, merge "
                "it into the base model and train a new one"
            )
        patches.apply(NAME, type(self))
        if on_unsloth(_causal_lm(given["model"])):
            patches.apply("llama_fast_forward")

    def _attaching(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # Unsloth's trainer loads no model by name

    def _check_live(self) -> None:
        """Raise a RuntimeError unless training will call our methods and the patched loss and forward."""
        order = type(self).__mro__
        generated = next(cls for cls in order if hasattr(sys.modules.get(cls.__module__), NAME))
        for name in OVERRIDDEN:
            owner = next(cls for cls in order if name in vars(cls))
            if name in vars(self) or order.index(owner) >= order.index(generated):
                raise RuntimeError(
                    f"HRPOTrainer.{name} is bypassed: {'the instance' if name in vars(self) else owner.__qualname__} has "
                    "its own, so training would ignore thinking states. Something replaced it after the class was created"
                )
        loss = inspect.unwrap(inspect.getattr_static(_base(type(self), "compute_loss"), "compute_loss"))
        if NAME not in loss.__code__.co_names:
            raise RuntimeError(
                f"{loss.__module__}.compute_loss no longer calls {NAME}, so its loss would ignore thinking states"
            )
        patches.verify(NAME)
        patches.verify("llama_fast_forward")

    # -- log-probs and loss -----------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, *args, **kwargs
    ):
        parent = functools.partial(
            super(
                HRPOMixin, self
            )._get_per_token_logps_and_entropies,  # Unsloth unwraps the model, so a partial cannot be passed
            model,
            input_ids,
            attention_mask,
            logits_to_keep,
            batch_size,
            *args,
            **kwargs,
        )
        if self._trace is None or self._is_reference(
            model
        ):  # called from the loss, which makes no forward here, or for the reference
            return parent()
        self._decide_precision("_unsloth_grpo_autocast")
        saved = self._fitted_trace(logits_to_keep)
        # Before the parent enters inference mode, whose tensors later forwards cannot use
        keywords = self._keywords(model, saved, input_ids=input_ids, attention_mask=attention_mask)
        with thinking_forwards(model, input_ids, self._tokenizer.pad_token_id, **keywords):
            return parent()

    def compute_loss(self, model, inputs, *args, **kwargs):
        if not self.thinking:
            return super().compute_loss(model, inputs, *args, **kwargs)
        self._decide_precision("_unsloth_grpo_autocast_unscored")
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        keywords = self._keywords(model, _trace_in(inputs), input_ids=ids, attention_mask=attention)
        with self.monitor.watching(), thinking_batch(**keywords) as scored:
            loss = super().compute_loss(model, inputs, *args, **kwargs)
        # Upstream treats every pad token as padding, so a pad token that is EOS is not in the loss
        real = inputs["completion_mask"] * (inputs["completion_ids"] != self._tokenizer.pad_token_id)
        self._record_monitors(inputs, completion_log_probs(scored[0], inputs["prompt_mask"], real), real)
        self._losses_seen = True
        return loss

    def training_step(self, *args, **kwargs):
        self._losses_seen = False
        loss = super().training_step(*args, **kwargs)
        if self.thinking and not self._losses_seen:
            raise RuntimeError(
                "a training step did not call HRPOTrainer.compute_loss, so its loss ignored thinking states"
            )
        return loss

    def _decide_precision(self, how: str) -> None:
        """Let Unsloth choose the precision of its forwards now. It does so only once, and our forwards come first."""
        vars(sys.modules[_base(type(self), "compute_loss").__module__])[how](self)

    def _autocast(self) -> contextlib.AbstractContextManager:
        return torch.amp.autocast(
            self.accelerator.device.type, dtype=self._autocast_dtype, enabled=self._autocast_enabled
        )


def completion_log_probs(packed: torch.Tensor, prompt_mask: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Turn Unsloth's log-probabilities (B, C + W) into (B, C).

    The completion of row i starts at column W - (left pads of row i).

    Args:
        packed (B, C + W): float.
        prompt_mask (B, P): 0 at left pads.
        mask (B, C): 0 where a token is not scored.

    Returns:
        (B, C) in the dtype of `packed`; 0 where `mask` is 0.
    """
    left_pads = (prompt_mask == 0).sum(dim=1)
    width = packed.shape[1] - mask.shape[1]
    columns = torch.arange(mask.shape[1], device=packed.device) + (width - left_pads)[:, None]
    return packed.gather(1, columns).masked_fill(mask == 0, 0)


def config_init(cls: type, parent: Any) -> Callable[..., None]:
    """The `__init__` of an `HRPOConfig` whose parent is Unsloth's `GRPOConfig`.

    It uses TRL's documented defaults, so the same script trains the same run on either backend. (Unsloth's own defaults
    are learning_rate=5e-5, optim="adamw_8bit", seed=3407, warm-up, weight decay, ... if its config is called from
    Python.) Every value goes through Unsloth's `__init__`, whose checks run and may change values: a batch size that
    does not hold whole groups, or settings that papers recommend for another `loss_type`. Three defaults are Unsloth's.
    The default `loss_type` is passed as not given, because a given "dapo" would set epsilon_high=0.28. `bf16=None`
    leaves the precision to the model and the device. There is no router loss, which Unsloth cannot compute.
    """
    defaults: dict[str, Any] = {
        f.name: f.default if f.default_factory is MISSING else f.default_factory for f in fields(cls) if f.init
    }
    factories = {f.name for f in fields(cls) if f.default_factory is not MISSING}
    own = {f.name for f in fields(HRPOArguments)}
    known = defaults.keys() | inspect.signature(parent.__init__).parameters.keys()

    @functools.wraps(cls.__init__)  # type: ignore[misc]  # mypy: __init__ is looked up on the class
    def __init__(self, output_dir: str | None = None, **given: Any) -> None:
        unknown = given.keys() - known  # Unsloth's would ignore them
        if unknown:
            raise TypeError(f"{cls.__name__}() has no field {', '.join(sorted(unknown))}")
        values = {name: value() if name in factories else value for name, value in defaults.items()}
        values |= {"output_dir": output_dir, **given}
        for name in own:  # before the parent's `__init__`, which ends in our `__post_init__`
            setattr(self, name, values.pop(name))
        if values["loss_type"] == defaults["loss_type"]:
            values["loss_type"] = None
        if values["bf16"] is None:
            values["bf16"] = False
        if values["router_aux_loss_coef"] is None:
            values["router_aux_loss_coef"] = 0.0
        parent.__init__(self, **values)

    return __init__


def _base(cls: type, name: str) -> Any:
    """The generated class that defines `name`."""
    return next(base for base in cls.__mro__ if name in vars(base) and hasattr(sys.modules.get(base.__module__), NAME))


def _causal_lm(model: nn.Module) -> nn.Module:
    return model.get_base_model() if is_peft_model(model) else model


def _with_adapter(model: nn.Module, config: Any, checkpointing: bool) -> nn.Module:
    unsloth = on_unsloth(model)
    config.task_type = config.task_type or "CAUSAL_LM"  # Unsloth patches only this kind of PeftModel
    model = get_peft_model(model, config)
    if not unsloth:
        return model
    from unsloth import FastLanguageModel

    return FastLanguageModel.patch_peft_model(model, use_gradient_checkpointing="unsloth" if checkpointing else False)
