"""Which backend carries a model: Unsloth's CUDA path where it can run, transformers + PEFT everywhere else."""

import importlib.util
import os
import sys

import torch
from torch import nn

import patches


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

    `patches/unsloth_block_compile.py` says why.
    """
    blocks = sys.modules.get("unsloth.models._block_compile")
    if blocks is None:
        return
    compiled = [module for module in model.modules() if getattr(type(module).forward, blocks._MARK, False)]
    if compiled:
        patches.apply("unsloth_block_compile", *compiled)
