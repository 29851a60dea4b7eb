"""Patch of `save_pretrained_merged`, which then also writes our modules and settings.

Unsloth copies the base's files and merges LoRA into them, so our modules and settings would be missing or as old as the
base (2026.10.9). The decoder's `complete_saved(model, folder)` adds them. Only the 16-bit merge and the adapter are
supported. Other methods are refused, and so are pushes, which upload before the files are complete.
"""

import functools
from typing import Any

from .registry import Patch, Site
from .save_pretrained import describer
from .unsloth_export import allowed, refuse


def _sites(*owners: Any) -> list[Site]:
    import unsloth  # noqa: F401
    from unsloth import save

    return [(owner, "unsloth_generic_save_pretrained_merged") for owner in owners or (save,)]


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def save_pretrained_merged(
        self, save_directory, tokenizer=None, save_method="merged_16bit", push_to_hub=False, *args, **kwargs
    ):
        describe = describer(self)
        if describe is None:
            return original(self, save_directory, tokenizer, save_method, push_to_hub, *args, **kwargs)
        how = str(save_method).strip().lower().replace(" ", "_")
        if push_to_hub or how not in ("merged_16bit", "lora"):
            refuse(self, f"save_pretrained_merged(save_method={save_method!r}, push_to_hub={push_to_hub})")
        with allowed():
            result = original(self, save_directory, tokenizer, save_method, push_to_hub, *args, **kwargs)
        if how == "merged_16bit":
            describe.__self__.complete_saved(self, save_directory)
        return result

    return save_pretrained_merged


PATCH = Patch(
    name="unsloth_save_merged",
    package="unsloth",
    target="unsloth.save.unsloth_generic_save_pretrained_merged",
    parameters=("self", "save_directory", "tokenizer", "save_method", "push_to_hub"),
    sites=_sites,
    wrap=_wrap,
    places=("unsloth/save.py:unsloth_generic_save_pretrained_merged",),
    effect="`save_pretrained_merged` also writes thinking modules and settings; methods that cannot are errors.",
    reason="HRPO on Unsloth: a merged model keeps its thinking modules",
    upstream="no upstream issue is known; for modules of the model's class https://github.com/unslothai/unsloth-zoo/pull/369",
    removable="when Unsloth's merge writes modules that the model's class does not know",
)
