"""What a trainer is given, checked before anything is loaded, and a model's planner."""

from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import PreTrainedModel
from transformers.utils import logging

from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.planner.config import read_settings
from unsloth_ext.planner.head import HEAD, attach_planner, check_adapter

from ..common.model_loading import attach_saved
from .config import PlannerExecutorConfig


logger = logging.get_logger(__name__)


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
    config = args.planner()
    if not hasattr(backbone_of(model), "planner_config"):
        attach_saved(
            model,
            "planner",
            lambda saved, name: attach_planner(model, read_settings(saved, name)),
            (HEAD,),
            args.hub_token,
        )
    if not hasattr(backbone_of(model), "planner_config"):
        if is_peft_model(model):
            raise ValueError("the model is wrapped by PEFT and has no planner: pass the bare model with peft_config")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            attach_planner(model, config)
        return
    if is_peft_model(model):
        check_method(model.active_peft_config)
        check_adapter(model)
    kept = backbone_of(model).planner_config
    for name, value in vars(config).items():
        if getattr(kept, name) != value and (name != "types" or args.types is not None):
            logger.warning(f"the model was made with {name}={getattr(kept, name)!r} and keeps it; asked for: {value!r}")
