"""Preparation of a model and its tokenizer for latent distillation, and checks of whether they can be trained."""

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import is_peft_model
from peft import PeftConfig
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from unsloth_ext.common.attaching import attached_modules, settings_of
from unsloth_ext.common.attention_tap import check_look
from unsloth_ext.common.hub import load_modules, load_tokenizer
from unsloth_ext.common.layer_kinds import check_layers
from unsloth_ext.common.positions import learned_positions
from unsloth_ext.common.settings_file import read_saved
from unsloth_ext.latent.config import (
    LatentConfig,
    attach_latent,
    attach_saved,
    check_adapter,
    read_settings,
    with_latent_modules,
)
from unsloth_ext.latent.method import METHOD

from ..common.model_loading import name_of, warn_of_kept_settings
from .config import LatentArguments
from .step_decoder import step_decoder_of


logger = logging.get_logger(__name__)

NOT_A_TOY = 10_000_000  # number of weights; smaller models, such as the embedded default's, are not pretrained


def tokenizer_of(model: Any, args: LatentArguments, given: Any) -> PreTrainedTokenizerBase:
    """The tokenizer to use, with a pad token.

    Args:
        model: the model, or its name.
        args: the trainer's configuration.
        given: a tokenizer; None: the model's.

    Raises:
        ValueError: there is no tokenizer, or it has no EOS token.
    """
    tokenizer = given
    if tokenizer is None and not name_of(model):
        raise ValueError("processing_class: pass the tokenizer, because the model's folder is unknown")
    if tokenizer is None:
        tokenizer = load_tokenizer(name_of(model), trust_remote_code=args.trust_remote_code)
    if tokenizer.eos_token is None:
        raise ValueError("the tokenizer has no eos_token: nothing would end an answer; set tokenizer.eos_token")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = args.pad_token or tokenizer.eos_token
    return tokenizer


@dataclass
class Preparation:
    """Attach latent tokens to a model, when called with it after loading and before PEFT wraps it.

    Attributes:
        model: the model to train, or its path.
        args: the trainer's configuration.
        tokenizer: the model's tokenizer.
        peft_config: a copy of the trainer's, which is changed to train the latent tokens too.
        settings: the latent settings in use: the ones asked for, or the ones that the model was made with.
        positions: size of the model's table of positions; None if it has none.
        step_decoder: SIM-CoT's decoder; None if it has no weight.
    """

    model: Any
    args: LatentArguments
    tokenizer: PreTrainedTokenizerBase
    peft_config: PeftConfig | None
    settings: LatentConfig = field(init=False)
    positions: int | None = field(init=False, default=None)
    step_decoder: PreTrainedModel | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.peft_config = copy.deepcopy(self.peft_config)
        self._saved = None
        asked = self.settings = self.args.latent_config()
        if isinstance(self.model, str):
            if Path(self.model, "adapter_config.json").exists():
                raise ValueError(
                    f"model={self.model!r} is an adapter: to train it further, pass LatentModel.from_pretrained(...).model "
                    "and no peft_config"
                )
            self._saved = read_saved(self.model, "latent", self.args.hub_token).settings
            if self._saved is not None:
                self.settings = read_settings(self._saved, self.model)[0]
        else:
            self.settings = settings_of(self.model, METHOD) or asked
        warn_of_kept_settings(self.model, self.settings, asked)

    def __call__(self, model: PreTrainedModel) -> None:
        """Attach the latent tokens.

        Raises:
            ValueError: the model cannot be trained with them.
        """
        has_latent = settings_of(model, METHOD) is not None
        if is_peft_model(model) and not has_latent:
            raise ValueError(
                "the model is wrapped by PEFT and has no latent tokens: pass the unwrapped model with peft_config"
            )
        if self.args.w_step_decoder:
            self.step_decoder = step_decoder_of(model)
        if self._saved is not None:
            attach_saved(model, self.tokenizer, self._saved, self.model)
            if modules := attached_modules(model, METHOD):
                load_modules(model, self.model, modules, self.args.hub_token)
        elif not has_latent:
            attach_latent(model, self.tokenizer, self.settings)
        if self.peft_config is not None:
            vars(self.peft_config).update(with_latent_modules(self.peft_config, model))
        elif is_peft_model(model):
            check_adapter(model)
        elif model.num_parameters() >= NOT_A_TOY and (self.args.w_codi or self.args.w_kv):
            logger.warning(
                "All weights are trained, because LoRA was not requested. A pretrained model lost its accuracy so (from "
                "56.5% to 7.0% in KaVa's ablation): pass a peft_config, or --lora_r 128 to a recipe"
            )
        if self.args.w_kv:
            check_layers(model, f"w_kv={self.args.w_kv}", self.args.max_length)
            check_look(model, f"w_kv={self.args.w_kv}")
        self.positions = learned_positions(model)
