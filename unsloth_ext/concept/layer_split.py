"""A check that a decoder's layers can be run separately."""

import torch
from torch import nn

from ..common.evaluation_mode import evaluating
from ..common.model_probe import same_states, trial_ids
from ..common.wrapping import backbone_of
from .forward import run_layers
from .masks import causal_mask


@torch.no_grad()
def check_split(model: nn.Module) -> float:
    """Compare a separate run of all layers and the final norm with the decoder's own forward, on a random text.

    Returns:
        The factor of embeddings before the first layer (Gemma, Granite).

    Raises:
        ValueError: the decoder does something else before, between or after its layers.
    """
    backbone, name = backbone_of(model), type(model).__name__
    if not all(hasattr(backbone, part) for part in ("layers", "norm", "rotary_emb", "embed_tokens")):
        raise ValueError(f"{name} is not built like llama, qwen2 or qwen3: its layers cannot be split")
    found: list[torch.Tensor] = []

    def see(_: nn.Module, args: tuple, kwargs: dict) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])

    embeds = backbone.embed_tokens(trial_ids(model, 12))
    handle = backbone.layers[0].register_forward_pre_hook(see, with_kwargs=True)
    try:
        with evaluating(model):
            backbone(inputs_embeds=torch.ones_like(embeds), use_cache=False)
            plain = backbone(inputs_embeds=embeds, use_cache=False).last_hidden_state
    finally:
        handle.remove()
    scale = found[0].flatten()[0].item()
    if not same_states(scale * embeds, found[1]):
        raise ValueError(
            f"{name} does more than scale embeddings before its first layer, which concepts would leave out: "
            "take a model such as llama or qwen3"
        )
    valid = torch.ones(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
    positions = valid.cumsum(1) - 1
    lacks = f"{name}: its layers, run separately, do not give the decoder's result, so concepts do not work"
    with evaluating(model):
        try:
            ours = run_layers(backbone, range(len(backbone.layers)), scale * embeds, causal_mask(valid), positions)
        except (TypeError, AttributeError, ValueError, KeyError) as error:
            raise ValueError(f"{lacks} ({error}); take a model such as llama or qwen3") from error
        if not same_states(backbone.norm(ours), plain):
            raise ValueError(f"{lacks}; take a model such as llama or qwen3")
    return scale
