"""Models with Unsloth's fast forwards, and what is said to them. Imported after Unsloth."""

import tempfile
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from unsloth import FastLanguageModel

from tests import tiny


def fast_model(base: PreTrainedModel | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A tiny one with its tokenizer, loaded by Unsloth; or another."""
    folder = tempfile.mkdtemp()
    (tiny.model("qwen2") if base is None else base).save_pretrained(folder)
    tiny.tokenizer(()).save_pretrained(folder)
    return FastLanguageModel.from_pretrained(folder, 128, torch.float32, load_in_4bit=False)


def refusal(make: Callable[..., Any], *args: Any, **keywords: Any) -> str:
    """The ValueError's text, or nothing."""
    try:
        make(*args, **keywords)
    except ValueError as error:
        return str(error)
    return ""
