"""Whether a causal LM's forward really thinks: asked of the model itself, since some drop keywords that they do not know.

`BloomForCausalLM`, `FalconForCausalLM`, `GPTJForCausalLM`, `MptForCausalLM` and others (transformers 5.17) take any keyword
and hand none on to their decoder; `OPTForCausalLM` calls an inner decoder past `OPTModel`. There the causal LM's own
forward is taught the keywords as well.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

import patches

from ..common.evaluation_mode import evaluating
from ..common.logits import logits_of
from ..common.unsloth_decoding import on_unsloth


LENGTH = 8  # tokens of the text that is asked about; states are given for its second half


def teach_forward(model: PreTrainedModel, backbone: nn.Module, source: str) -> None:
    """Teach a causal LM's forward our keywords, then ask it: two forwards of `LENGTH` tokens, no gradient.

    The states given are embeddings of other tokens, taken whole; the logits must be those of a text with these tokens.
    Weights that are not there yet (meta device, ZeRO-3) cannot be asked, nor can Unsloth's forwards, whose own patch is
    verified when it is applied. Draws nothing from the global RNG.

    Args:
        model: not wrapped by PEFT. backbone: its decoder.
        source: of the thinking states, as in `ThinkingConfig`.

    Raises:
        ValueError: thinking states would be lost, or the hidden states that the LM head reads are not the decoder's.
    """
    patches.apply("base_model_forward", type(backbone))  # a no-op where Unsloth's forward is patched already
    if on_unsloth(model):
        return
    weight = model.get_input_embeddings().weight
    if weight.is_meta or not weight.numel():
        patches.apply("base_model_forward", type(model))
        return
    with evaluating(model), torch.no_grad():
        if not _states_arrive(model, backbone):
            patches.apply("base_model_forward", type(model))
            if not _states_arrive(model, backbone):
                raise ValueError(
                    f"{type(model).__name__} cannot think: its forward loses thinking states that are given to it. Choose "
                    "a causal LM that reads all of a token from its input embedding"
                )
        _check_hidden(model, backbone, source)


def decoder_of(model: nn.Module, backbone: nn.Module) -> nn.Module:
    """What hands hidden states to the LM head: OPT's calls an inner decoder past its base model."""
    decoder = model.get_decoder()
    return backbone if hasattr(decoder, "lm_head") else decoder  # of Llama 4 it is the causal LM (transformers 5.17)


def _texts(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    weight = model.get_input_embeddings().weight
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(weight.shape[0], (2, 1, LENGTH), generator=source)
    return tuple(ids.to(weight.device))


def _states_arrive(model: PreTrainedModel, backbone: nn.Module) -> bool:
    ids, others = _texts(model)
    half = LENGTH // 2
    mask = torch.ones(1, half, dtype=torch.bool, device=ids.device)
    states = model.get_input_embeddings()(others[:, half:])
    backbone.fuse_thinking = lambda embeds, thinking_mask, thinking_states, hidden_states: torch.cat(
        [embeds[:, :half], thinking_states], dim=1
    )
    try:
        given = model(input_ids=ids, thinking_mask=mask, thinking_embeds=states, use_cache=False).logits
    finally:
        del backbone.fuse_thinking
    wanted = model(input_ids=torch.cat([ids[:, :half], others[:, half:]], dim=1), use_cache=False).logits
    return _alike(given, wanted)


def _check_hidden(model: PreTrainedModel, backbone: nn.Module, source: str) -> None:
    """Rollouts read the LM head's input, training the decoder's output, soft embeddings `logits_of` it: all must agree."""
    seen = []
    handles = [
        decoder_of(model, backbone).register_forward_hook(lambda _, __, output: seen.append(output[0])),
        model.get_output_embeddings().register_forward_pre_hook(lambda _, args: seen.append(args[0])),
    ]
    try:
        logits = model(input_ids=_texts(model)[0], use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()
    if len(seen) != 2 or seen[0].shape != seen[1].shape or not torch.equal(seen[0].to(seen[1]), seen[1]):
        raise ValueError(
            f"{type(model).__name__} cannot think: its LM head does not read what its decoder puts out, so rollout and "
            "training would make their thinking states from different hidden states. Choose a causal LM whose head is one "
            "linear layer"
        )
    if source == "soft_embedding" and not _alike(logits_of(model, seen[1]), logits):
        raise ValueError(
            f"{type(model).__name__} cannot think in soft embeddings: it scales its logits in a way that "
            'unsloth_ext.common.logits.logits_of does not know. Choose thinking_source="projection"'
        )


def _alike(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """The same operations on the same numbers, but for kernels that add up in any order."""
    return torch.allclose(found, wanted, rtol=0, atol=1e-2 * wanted.abs().max().item(), equal_nan=True)
