"""Patch of Unsloth's decoder forward (`LlamaModel_fast_forward`), which then accepts thinking states.

One function serves Unsloth's llama, mistral, gemma, gemma2, qwen2, qwen3 and others. Each family's module imports it
under its own name, and loading a model puts it on the transformers class, behind a gate that sends models that Unsloth
did not load to the stock forward. All of these are replaced. Apply the patch before or after a model is loaded.

After `revert`, transformers classes of models loaded in between still call the original through the replacement. It
changes nothing for calls without our keywords.
"""

import functools
import inspect
import sys
from typing import Any

from ._thinking import fused_embeddings, take_thinking
from .registry import _MARK as MARK
from .registry import Patch, Site


NAME = "LlamaModel_fast_forward"


def _sites(*owners: Any) -> list[Site]:
    import unsloth  # noqa: F401 - importing it changes transformers' classes, which are read below
    from unsloth.models import llama

    original = inspect.unwrap(getattr(llama, NAME))
    if owners:
        return [(owner, "forward" if isinstance(owner, type) else NAME) for owner in owners]
    modules = {name: module for name, module in sys.modules.items() if module is not None}
    sites: list[Site] = [
        (module, NAME)
        for name, module in modules.items()
        if name.startswith("unsloth.models.") and inspect.unwrap(vars(module).get(NAME, object)) is original
    ]
    for name, module in modules.items():
        if not name.startswith("transformers.models.") or ".modeling_" not in name:
            continue
        for cls in [value for value in vars(module).values() if isinstance(value, type)]:
            forward = vars(cls).get("forward")
            # A gate around our own replacement is patched already
            if cls.__module__ == name and forward is not None and _innermost(forward) is original:
                sites.append((cls, "forward"))
    return sites


def _innermost(function: Any) -> Any:
    """Return the function under all `functools.wraps` of a function, or None if a replacement of ours is among them."""
    while hasattr(function, "__wrapped__"):
        if vars(function).get(MARK) == PATCH.name:
            return None
        function = function.__wrapped__
    return function


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def fast_forward(self, input_ids=None, *args, **kwargs):
        thinking = take_thinking(kwargs)
        if thinking.get("thinking_mask") is not None:
            # This is before Unsloth scales (gemma) and masks (DPO) embeddings. It refuses ids and embeddings together
            kwargs["inputs_embeds"] = fused_embeddings(self, input_ids, kwargs.get("inputs_embeds"), thinking)
            input_ids = None
        return original(self, input_ids, *args, **kwargs)

    return fast_forward


PATCH = Patch(
    name="llama_fast_forward",
    package="unsloth",
    target=f"unsloth.models.llama.{NAME}",
    parameters=(
        "self",
        "input_ids",
        "causal_mask",
        "attention_mask",
        "position_ids",
        "past_key_values",
        "inputs_embeds",
    ),
    sites=_sites,
    wrap=_wrap,
    places=("unsloth/models/llama.py:LlamaModel_fast_forward",),
    effect="Unsloth's decoder forward takes thinking states, as the keywords in `patches/_thinking.py`.",
    reason="HRPO on Unsloth: the decoder's forward takes no thinking states",
    upstream="no upstream issue is known: the keywords belong to this project",
    removable="never, while HRPO trains on Unsloth",
)
