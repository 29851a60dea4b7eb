"""SFT of a model with a shift."""

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from trl import SFTConfig, SFTTrainer
from unsloth_ext.toy.method import METHOD
from unsloth_ext.toy.shift import ToySettings, attach_toy, with_toy_modules

from ..common.checkpointing import SafeCheckpointMixin
from ..common.config_checks import check_values, check_weights
from ..common.model_loading import attach_method, keeping_master_weights, preparing_models


@dataclass
class ToyConfig(SFTConfig):
    """SFT's configuration, and that of the shift."""

    flags_title = "Toy"

    shift_std: float = field(default=0.01, metadata={"help": "Standard deviation of the shift at first."})

    def __post_init__(self) -> None:
        check_values(self)
        check_weights(shift_std=self.shift_std)
        super().__post_init__()


class ToyTrainer(SafeCheckpointMixin, SFTTrainer):
    """Same constructor as `SFTTrainer`. A model without a shift is given one, before PEFT wraps it."""

    _tag_names = ["trl", "toy"]
    _name = "Toy"
    _latent_method = METHOD.name

    def __init__(self, model: Any, args: ToyConfig, **keywords: Any):
        lora = keywords["peft_config"] = copy.deepcopy(keywords.get("peft_config"))
        if lora is not None:
            vars(lora).update(with_toy_modules(lora))
        if not isinstance(model, str):
            give(model, args)
        with preparing_models(self._stock_init, lambda x: give(x, args)), keeping_master_weights(self, model):
            super().__init__(model, args, **keywords)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        vectors = [p for name, p in self.model.named_parameters() if "toy_shift" in name]
        logs = {**logs, "toy/norm": torch.linalg.vector_norm(vectors[-1].detach()).item()}
        super().log(logs, *args, **kwargs)


def give(model: Any, args: ToyConfig) -> None:
    """Give a model its shift, unless it has one."""
    asked = ToySettings(args.shift_std)
    attach_method(model, METHOD, functools.partial(attach_toy, model), asked, args.hub_token, args.seed)
