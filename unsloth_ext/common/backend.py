"""Which backend carries a model: Unsloth's CUDA path where it can run, transformers + PEFT everywhere else."""

import importlib.util
import os
import sys

import torch
from torch import nn


def unsloth_can_run() -> tuple[bool, str]:
    """(whether `FastLanguageModel` is to be used, why). Does not import Unsloth.

    Unsloth runs its own forwards on a GPU, or on a CPU under its CI switch `UNSLOTH_ALLOW_CPU=1`; its CPU backend is
    stock transformers, so there the stock path is taken directly.
    """
    if importlib.util.find_spec("unsloth") is None:
        return False, "unsloth is not installed"
    if os.environ.get("UNSLOTH_ALLOW_CPU", "0") == "1":
        return True, "UNSLOTH_ALLOW_CPU=1 runs Unsloth's CUDA code on the CPU"
    if torch.cuda.is_available():
        return True, f"unsloth is installed and {torch.cuda.get_device_name()} is visible"
    return False, "no CUDA device is visible"


def without_block_compile(model: nn.Module) -> None:
    """Let decoder layers that Unsloth compiles whole in training run as they are written, from now on.

    Once it has given LoRA to one model, Unsloth compiles the layers of all models of that class, stock ones too. What looks
    inside a layer is in its graph; checkpointing's recomputation, after the look, would compile another one and fail.
    """
    blocks = sys.modules.get("unsloth.models._block_compile")
    if blocks is None:
        return
    for module in model.modules():
        if getattr(type(module).forward, blocks._MARK, False):
            module.__dict__["_unsloth_block_mode"] = blocks._OFF
