"""Patch of Unsloth's `get_peft_model`, which then accepts our thinking modules in `modules_to_save`.

Unsloth accepts embeddings, the LM head and norms there and refuses everything else. It asks `_norm_modules_to_save`
whether an entry names modules that it can train in full.
"""

import functools
from typing import Any

from .registry import Patch, Site


PREFIX = "thinking_"


def _sites(*owners: Any) -> list[Site]:
    import unsloth  # noqa: F401
    from unsloth.models import llama

    return [(owner, "_norm_modules_to_save") for owner in owners or (llama,)]


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def norm_modules_to_save(model, name):
        ours = isinstance(name, str) and name.startswith(PREFIX)
        if ours and any(key.split(".")[-1] == name for key, _ in model.named_modules()):
            return True
        return original(model, name)

    return norm_modules_to_save


PATCH = Patch(
    name="peft_module_check",
    package="unsloth",
    target="unsloth.models.llama._norm_modules_to_save",
    parameters=("model", "name"),
    sites=_sites,
    wrap=_wrap,
    places=("unsloth/models/llama.py:_norm_modules_to_save",),
    effect="`get_peft_model` accepts modules of a model whose names begin with `thinking_` in `modules_to_save`.",
    reason="HRPO on Unsloth: thinking modules are trained and saved with a LoRA adapter",
    upstream="https://github.com/unslothai/unsloth/issues/3235",
    removable="when Unsloth accepts any module name in `modules_to_save`",
)
