"""Check that a model decodes a batch as it decodes each of its rows alone."""

import torch
from torch import nn
from transformers import GenerationConfig

from .evaluation_mode import evaluating
from .layer_kinds import HYBRID, RECURRENT, layer_kinds
from .model_probe import same_states
from .unsloth_decoding import on_unsloth
from .wrapping import backbone_of, causal_lm_of


LENGTH, PADS, TOKENS = 8, 2, 3  # of the two trial texts: their tokens, pads before the second, decoded tokens


@torch.no_grad()
def check_batches(model: nn.Module) -> None:
    """Check that rows of a batch do not affect each other and that pads do not enter a recurrent state.

    The first fails for RWKV, the second for RecurrentGemma (transformers 5.17). The check decodes a few greedy tokens
    after two texts, once for each model. It is skipped if weights are not in memory (meta device, ZeRO-3). It does not
    use the global RNG.

    Raises:
        ValueError: the model decodes a batch differently.
    """
    causal_lm, backbone = causal_lm_of(model), backbone_of(model)
    if on_unsloth(causal_lm) or not {RECURRENT, HYBRID} & {kind.name for kind in layer_kinds(model)}:
        return
    weight = causal_lm.get_input_embeddings().weight
    if weight.is_meta or not weight.numel():
        return
    if not hasattr(backbone, "decodes_batches"):
        backbone.decodes_batches = _decodes_batches(causal_lm, weight)
    if not backbone.decodes_batches:
        raise ValueError(
            f"{type(causal_lm).__name__} decodes a batch differently from its rows one by one, even without thinking: "
            "generate from one prompt at a time, and train another family"
        )


def _decodes_batches(causal_lm: nn.Module, weight: torch.Tensor) -> bool:
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(weight.shape[0], (2, LENGTH), generator=source).to(weight.device)
    mask = torch.ones_like(ids)
    mask[1, :PADS] = 0
    config = GenerationConfig(
        max_new_tokens=TOKENS, do_sample=False, output_logits=True, return_dict_in_generate=True, pad_token_id=0
    )
    with evaluating(causal_lm):
        out = causal_lm.generate(ids, attention_mask=mask, generation_config=config)
        first, second = out.sequences[:1], out.sequences[1:, PADS:]
        alone = torch.stack([causal_lm(text, use_cache=False).logits[0, -2] for text in (first, second)])
    return same_states(out.logits[-1], alone.to(weight.dtype))
