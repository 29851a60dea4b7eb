"""Patch of transformers' decoder forwards (`LlamaModel.forward` and the like), which then accept thinking states.

It works for every architecture whose base model takes `(self, input_ids, ...)` and `inputs_embeds`. The default sites
are the six families that are tested. `apply("base_model_forward", type(model.base_model))` adds another one, and
`type(model)` a causal LM that does not pass our keywords on.
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
    places=(
        "transformers/models/llama/modeling_llama.py:LlamaModel.forward",
        "transformers/models/qwen2/modeling_qwen2.py:Qwen2Model.forward",
        "transformers/models/qwen3/modeling_qwen3.py:Qwen3Model.forward",
        "transformers/models/mistral/modeling_mistral.py:MistralModel.forward",
        "transformers/models/gemma/modeling_gemma.py:GemmaModel.forward",
        "transformers/models/gpt2/modeling_gpt2.py:GPT2Model.forward",
    ),
    effect="The forward of a decoder takes thinking states, as the keywords in `patches/_thinking.py`.",
    reason="HRPO on transformers' models: `forward` takes no thinking states",
    upstream="no upstream issue is known: the keywords belong to this project",
    removable="never, while HRPO passes thinking states to `model.forward`",
)
