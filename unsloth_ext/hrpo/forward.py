"""Extension of a causal LM's forward by thinking states, and a test that the states have an effect.

`BloomForCausalLM`, `FalconForCausalLM`, `GPTJForCausalLM`, `MptForCausalLM` and others (transformers 5.17) accept any
keyword and pass none to their decoder. `OPTForCausalLM` calls an inner decoder and not `OPTModel`. In such cases the
causal LM's own forward is patched as well.
"""

import torch
from torch import nn
from transformers import PreTrainedModel

import patches

from ..common.evaluation_mode import evaluating
from ..common.logits import logits_of
from ..common.unsloth_decoding import on_unsloth


LENGTH = 8  # tokens of the trial text; its second half gets states


def teach_forward(model: PreTrainedModel, backbone: nn.Module, source: str) -> None:
    """Add our keywords to a causal LM's forward and test them with two forwards of `LENGTH` tokens, without gradients.

    The trial states are embeddings of other tokens, which replace those of the text. The logits must be those of a text
    with these tokens. The test is skipped if weights are not in memory (meta device, ZeRO-3), and for Unsloth's
    forwards, whose patch is verified when it is applied. The global RNG is not used.

    Args:
        model: the causal LM, not wrapped by PEFT.
        backbone: its decoder.
        source: `thinking_source` of `ThinkingConfig`.

    Raises:
        ValueError: thinking states would be lost, or the LM head reads other hidden states than the decoder's output.
    """
    patches.apply("base_model_forward", type(backbone))  # does nothing if Unsloth's forward is patched already
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
                    f"{type(model).__name__} cannot think: its forward loses thinking states. Choose "
                    "a causal LM that reads tokens only through its input embedding"
                )
        _check_hidden(model, backbone, source)


def decoder_of(model: nn.Module, backbone: nn.Module) -> nn.Module:
    """Return the module that gives the LM head its hidden states. OPT's is an inner decoder of its base model."""
    decoder = model.get_decoder()
    return backbone if hasattr(decoder, "lm_head") else decoder  # Llama 4 returns the causal LM (transformers 5.17)


def _texts(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    weight = model.get_input_embeddings().weight
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(weight.shape[0], (2, 1, LENGTH), generator=source)
    return tuple(ids.to(weight.device))


def _states_arrive(model: PreTrainedModel, backbone: nn.Module) -> bool:
    ids, others = _texts(model)
    half = LENGTH // 2
    thinking_mask = torch.ones(1, half, dtype=torch.bool, device=ids.device)
    states = model.get_input_embeddings()(others[:, half:])
    backbone.fuse_thinking = lambda embeds, thinking_mask, thinking_states, hidden_states: torch.cat(
        [embeds[:, :half], thinking_states], dim=1
    )
    try:
        given = model(input_ids=ids, thinking_mask=thinking_mask, thinking_embeds=states, use_cache=False).logits
    finally:
        del backbone.fuse_thinking
    wanted = model(input_ids=torch.cat([ids[:, :half], others[:, half:]], dim=1), use_cache=False).logits
    return _alike(given, wanted)


def _check_hidden(model: PreTrainedModel, backbone: nn.Module, source: str) -> None:
    """Check that the LM head's input (read in rollouts), the decoder's output (in training) and `logits_of` agree."""
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
            f"{type(model).__name__} cannot think: its LM head does not read its decoder's output, so rollout and "
            "training would make thinking states from different hidden states. Choose a causal LM whose head is one "
            "linear layer"
        )
    if source != "projection" and not _alike(logits_of(model, seen[1]), logits):
        raise ValueError(
            f"{type(model).__name__} cannot think in embeddings of several tokens: it scales its logits in a way that "
            'unsloth_ext.common.logits.logits_of does not know. Choose thinking_source="projection"'
        )


def _alike(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Return whether tensors are equal up to the order in which kernels add."""
    return torch.allclose(found, wanted, rtol=0, atol=1e-2 * wanted.abs().max().item(), equal_nan=True)
