"""Choice of the backend that runs a model: Unsloth's CUDA path where it can run, transformers and PEFT elsewhere."""

import importlib.util
import os
import sys

import torch
from torch import nn

import patches


def unsloth_can_run() -> tuple[bool, str]:
    """Return whether to use `FastLanguageModel`, and the reason. Does not import Unsloth.

    Unsloth runs its own forwards on a GPU, or on a CPU under its CI switch `UNSLOTH_ALLOW_CPU=1`. Its CPU backend is
    stock transformers, so on a CPU we use transformers directly.
    """
    if importlib.util.find_spec("unsloth") is None:
        return False, "unsloth is not installed"
    if os.environ.get("UNSLOTH_ALLOW_CPU", "0") == "1":
        return True, "UNSLOTH_ALLOW_CPU=1 runs Unsloth's CUDA code on the CPU"
    if torch.cuda.is_available():
        return True, f"unsloth is installed and {torch.cuda.get_device_name()} is visible"
    return False, "no CUDA device is visible"


def without_block_compile(model: nn.Module) -> None:
    """Run decoder layers that Unsloth compiles whole in training without this compilation from now on.

    `patches/unsloth_block_compile.py` gives the reason.
    """
    blocks = sys.modules.get("unsloth.models._block_compile")
    if blocks is None:
        return
    compiled = [module for module in model.modules() if getattr(type(module).forward, blocks._MARK, False)]
    if compiled:
        patches.apply("unsloth_block_compile", *compiled)
