"""The keywords a patched decoder forward understands, shared by Unsloth's and transformers' forwards."""

from typing import Any

import torch


KEYWORDS = (
    "thinking_mask",
    "thinking_embeds",
    "recompute_thinking_projection",
    "thinking_hidden_states_cache",
)


def take_thinking(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove our keywords from `kwargs` and return those that were given."""
    return {key: kwargs.pop(key) for key in KEYWORDS if key in kwargs}


def fused_embeddings(
    backbone: torch.nn.Module,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    thinking: dict[str, Any],
) -> torch.Tensor:
    """Embed `input_ids` (B, T) unless `inputs_embeds` (B, T, d) is given, then fuse the thinking states in.

    The maths lives on the model (`backbone.fuse_thinking`, put there by `unsloth_ext.attach_thinking`).
    """
    if not hasattr(backbone, "fuse_thinking"):
        raise ValueError(
            f"{type(backbone).__name__} was called with {', '.join(thinking)} but has no thinking modules; call "
            "unsloth_ext.attach_thinking(model) first"
        )
    if inputs_embeds is None:
        inputs_embeds = backbone.get_input_embeddings()(input_ids)
    return backbone.fuse_thinking(inputs_embeds, **thinking)
