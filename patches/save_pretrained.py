"""Patch of `save_pretrained` of transformers and PEFT, after which a model can write more files into its folder.

If a decoder has an attribute `describe_saved(model, folder, kept_card)`, it is called after the original. PEFT's
`save_pretrained` rewrites the tags of an existing model card (0.21), so the old card is passed as well.
"""

import functools
from pathlib import Path
from typing import Any

from .registry import Patch, Site


def _sites(*owners: type) -> list[Site]:
    from peft import PeftModel
    from transformers import PreTrainedModel

    return [(owner, "save_pretrained") for owner in owners or (PreTrainedModel, PeftModel)]


def describer(model: Any) -> Any:
    """Return `describe_saved` of the decoder in a causal LM, through PEFT; None if it has none."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(getattr(bare, "base_model", None), "describe_saved", None)


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained(self, save_directory, *args, **kwargs):
        describe = describer(self)
        if describe is None:
            return original(self, save_directory, *args, **kwargs)
        card = Path(save_directory, "README.md")
        kept = card.read_text() if card.is_file() else None
        result = original(self, save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            describe(self, save_directory, kept)
        return result

    return save_pretrained


PATCH = Patch(
    name="save_pretrained",
    package="transformers",
    target="save_pretrained of PreTrainedModel and PeftModel",
    parameters=("self", "save_directory"),
    sites=_sites,
    wrap=_wrap,
    places=(
        "transformers/modeling_utils.py:PreTrainedModel.save_pretrained",
        "peft/peft_model.py:PeftModel.save_pretrained",
    ),
    effect="After a model is saved, its decoder's `describe_saved` writes our settings and completes the model card.",
    reason="every method with modules: a saved folder holds `latent_reasoning.json` and a model card",
    upstream="no upstream issue is known",
    removable="when transformers and PEFT call a hook of the model after saving",
)
