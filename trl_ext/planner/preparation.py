"""Checks of a trainer's arguments before anything is loaded, and attachment of the planner."""

import functools
from typing import Any

from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import PreTrainedModel

from unsloth_ext.common.attaching import settings_of
from unsloth_ext.planner.head import attach_planner
from unsloth_ext.planner.method import METHOD

from ..common.model_loading import attach_method
from .config import PlannerExecutorConfig


def check_given(given: dict[str, Any], args: PlannerExecutorConfig) -> None:
    """Raise a ValueError for arguments of `SFTTrainer` that cannot be used with a planner, and for unusable datasets."""
    for name in ("data_collator", "compute_loss_func"):
        if given.get(name) is not None:
            raise ValueError(f"{name}: planner and executor have their own; leave it out")
    rows = given.get("train_dataset")
    if isinstance(rows, Dataset) and not len(rows):
        raise ValueError("train dataset: has no rows")
    if isinstance(rows, IterableDataset) and args.training == "hard_em":
        raise ValueError(
            "train dataset: training='hard_em' stores a plan for each row, but the size of an iterable dataset is "
            "unknown; use a Dataset, or training='soft'"
        )


def check_method(config: PeftConfig) -> None:
    """Raise a ValueError for a PEFT method that works above the backbone, because planner and executor call the
    backbone."""
    if config.is_prompt_learning:
        raise ValueError(f"{type(config).__name__} adds virtual tokens, which the planner would not see; use LoRA")


def attach(model: PreTrainedModel, args: PlannerExecutorConfig) -> None:
    """Attach a planner to a model, unless it has one.

    Raises:
        ValueError: the model's adapter would not train the planner, or was made before it.
    """
    if is_peft_model(model) and settings_of(model, METHOD) is not None:
        check_method(model.active_peft_config)
    attach_method(
        model,
        METHOD,
        functools.partial(attach_planner, model),
        args.planner(),
        args.hub_token,
        args.seed,
        unasked=("types",) if args.types is None else (),
    )
