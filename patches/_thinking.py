"""The thinking keywords of a patched decoder forward, shared by Unsloth's and transformers' forwards."""

from typing import Any

import torch


KEYWORDS = (
    "thinking_mask",
    "thinking_embeds",
    "recompute_thinking_projection",
    "thinking_hidden_states_cache",
)


def take_thinking(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Remove our keywords from `kwargs` and return those that were given.

    Raises:
        ValueError: there are states without a mask that says where they belong.
    """
    thinking = {key: kwargs.pop(key) for key in KEYWORDS if key in kwargs}
    given = [key for key, value in thinking.items() if value is not None and value is not False]
    if given and "thinking_mask" not in given:
        raise ValueError(f"{', '.join(given)} without thinking_mask: the mask says which tokens think")
    return thinking


def fused_embeddings(
    backbone: torch.nn.Module,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    thinking: dict[str, Any],
) -> torch.Tensor:
    """Embed the tokens and fuse the thinking states in. There are three kinds of calls:

    | input_ids | inputs_embeds | tokens        | states                                                        |
    |-----------|---------------|---------------|---------------------------------------------------------------|
    | (B, T)    | -             | input_ids     | thinking_embeds (B, S, d), or the cache                       |
    | -         | (B, T, d)     | inputs_embeds | thinking_embeds (B, S, d), or the cache                       |
    | (B, T)    | (B, S, d)     | input_ids     | inputs_embeds, or the cache (the form with both inputs)       |

    `backbone.fuse_thinking`, which `unsloth_ext.attach_thinking` adds, does the computation. The keywords of the
    patched forward are translated here: `thinking_embeds` become `thinking_states`, and `thinking_hidden_states_cache`
    becomes `hidden_states`, from which states are made.

    Args:
        backbone: the decoder with the thinking modules.
        input_ids (B, T): long, or None.
        inputs_embeds (B, T, d): floating point, or None. (B, S, d) in the third kind of call.
        thinking: the keywords, as from `take_thinking`.

    Returns:
        (B, T, d) in the dtype of the embeddings.

    Raises:
        ValueError: the model has no thinking modules; there are no states; or, in the third kind of call, states are
            given twice or have the wrong shape or dtype.
    """
    if not hasattr(backbone, "fuse_thinking"):
        raise ValueError(
            f"{type(backbone).__name__} was called with {', '.join(thinking)} but has no thinking modules; call "
            "unsloth_ext.attach_thinking(model) first"
        )
    embedding = backbone.get_input_embeddings()
    if input_ids is not None and inputs_embeds is not None:
        if thinking.get("thinking_embeds") is not None:
            raise ValueError(
                "input_ids, inputs_embeds and thinking_embeds: with input_ids, inputs_embeds are the thinking states, so "
                "they are given twice; leave one of the three out"
            )
        thinking_mask, width = thinking["thinking_mask"], embedding.weight.shape[1]
        if inputs_embeds.shape != (*thinking_mask.shape, width) or not inputs_embeds.is_floating_point():
            raise ValueError(
                f"inputs_embeds {tuple(inputs_embeds.shape)} {inputs_embeds.dtype} with input_ids are the thinking "
                "states: they must have the shape of thinking_mask and the width of an embedding, "
                f"{(*thinking_mask.shape, width)}, in floating point. Leave input_ids out if they are the tokens' "
                "embeddings"
            )
        thinking = {**thinking, "thinking_embeds": inputs_embeds}
        inputs_embeds = None
    if inputs_embeds is None:
        inputs_embeds = embedding(input_ids)
    recompute, cache = thinking.get("recompute_thinking_projection"), thinking.get("thinking_hidden_states_cache")
    if recompute and cache is None:
        raise ValueError("recompute_thinking_projection=True needs thinking_hidden_states_cache")
    if not recompute and thinking.get("thinking_embeds") is None:
        raise ValueError("thinking_mask was given without thinking_embeds or thinking_hidden_states_cache")
    return backbone.fuse_thinking(
        inputs_embeds,
        thinking["thinking_mask"],
        thinking_states=None if recompute else thinking["thinking_embeds"],
        hidden_states=cache if recompute else None,
    )
