"""What a trainer is given, checked before anything is loaded, and a model's planner."""

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
    """Raises a ValueError for arguments of `SFTTrainer` that planning has no use for, and rows it cannot take."""
    for name in ("data_collator", "compute_loss_func"):
        if given.get(name) is not None:
            raise ValueError(f"{name}: rows of planner and executor have one of their own; leave it out")
    rows = given.get("train_dataset")
    if isinstance(rows, Dataset) and not len(rows):
        raise ValueError("train dataset: not one row")
    if isinstance(rows, IterableDataset) and args.training == "hard_em":
        raise ValueError(
            "train dataset: training='hard_em' keeps a plan for each row, and an iterable dataset does not say how many "
            "there are; use a Dataset, or training='soft'"
        )


def check_method(config: PeftConfig) -> None:
    """Raises a ValueError for a PEFT method that works above the backbone, which planner and executor call."""
    if config.is_prompt_learning:
        raise ValueError(
            f"{type(config).__name__} adds virtual tokens, which plans would not be written after; use LoRA"
        )


def attach(model: PreTrainedModel, args: PlannerExecutorConfig) -> None:
    """Give a model its planner, unless it has one.

    Raises:
        ValueError: its adapter would leave the planner untrained, or was made before it.
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
