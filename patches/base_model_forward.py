"""Stock transformers decoders (`LlamaModel.forward` and its like): accept thinking states as keywords.

Works with every architecture whose base model takes `(self, input_ids, ...)` and `inputs_embeds`; the default sites are
the six families that are tested. `apply("base_model_forward", type(model.base_model))` adds another, `type(model)` a causal
LM that would not hand our keywords on.
"""

import functools
import importlib
from typing import Any

from ._thinking import fused_embeddings, take_thinking
from .registry import Patch, Site


FAMILIES = {
    "llama": "LlamaModel",
    "qwen2": "Qwen2Model",
    "qwen3": "Qwen3Model",
    "mistral": "MistralModel",
    "gemma": "GemmaModel",
    "gpt2": "GPT2Model",
}


def _sites(*owners: type) -> list[Site]:
    classes = owners or [
        getattr(importlib.import_module(f"transformers.models.{family}.modeling_{family}"), name)
        for family, name in FAMILIES.items()
    ]
    return [(cls, "forward") for cls in classes]


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def forward(self, input_ids=None, *args, **kwargs):
        thinking = take_thinking(kwargs)
        if thinking.get("thinking_mask") is None:
            return original(self, input_ids, *args, **kwargs)
        kwargs["inputs_embeds"] = fused_embeddings(self.base_model, input_ids, kwargs.get("inputs_embeds"), thinking)
        return original(self, None, *args, **kwargs)

    return forward


PATCH = Patch(
    name="base_model_forward",
    package="transformers",
    target="transformers base model forward",
    parameters=("self", "input_ids"),
    sites=_sites,
    wrap=_wrap,
    reason="stock backend: the decoder's forward takes thinking states",
)
