"""Patch of GraniteMoeShared's forward, which records no router logits before transformers 5.24.

With `output_router_logits` its causal LM fails on an auxiliary loss that is the integer 0, and TRL's trainers find no
loss.
"""

import functools
from typing import Any

from .registry import Patch, Site, apply


NAME = "granite_router_logits"


def needed() -> bool:
    """Return whether transformers does not record router logits itself."""
    from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedModel

    return "router_logits" not in (GraniteMoeSharedModel._can_record_outputs or {})


def ensure() -> None:
    """Apply this patch where it is needed."""
    if needed():
        apply(NAME)


def _sites(*owners: Any) -> list[Site]:
    from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedModel

    return [(owner, "forward") for owner in owners or (GraniteMoeSharedModel,)]


def _wrap(original: Any) -> Any:
    from transformers.models.granitemoeshared.modeling_granitemoeshared import GraniteMoeSharedTopKRouter

    @functools.wraps(original)
    def forward(self, *args, **kwargs):
        found = []
        routers = [module for module in self.modules() if isinstance(module, GraniteMoeSharedTopKRouter)]
        handles = [router.register_forward_hook(lambda _, __, out: found.append(out[2])) for router in routers]
        try:
            outputs = original(self, *args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        if not isinstance(outputs, tuple):  # a tuple (`return_dict=False`) has no place for them
            outputs.router_logits = tuple(found)
        return outputs

    return forward


PATCH = Patch(
    name=NAME,
    package="transformers",
    target="transformers.models.granitemoeshared.modeling_granitemoeshared.GraniteMoeSharedModel.forward",
    parameters=("self", "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "use_cache"),
    sites=_sites,
    wrap=_wrap,
    places=("transformers/models/granitemoeshared/modeling_granitemoeshared.py:GraniteMoeSharedModel",),
    effect="The model's output has `router_logits`, which forward hooks on the routers record.",
    reason="MiniMind2-MoE: the auxiliary loss needs router logits and fails without them",
    upstream="no upstream issue is known for this model; for others https://github.com/huggingface/transformers/pull/46642",
    removable="when transformers 5.23 is no longer supported: 5.24 records GraniteMoeShared's router logits",
)
