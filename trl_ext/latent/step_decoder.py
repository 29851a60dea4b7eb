"""SIM-CoT (arXiv 2509.20317): a decoder that writes each step from the latent tokens that stand for it, in training only.

It reads latent inputs, then the step, but not the question. So what it needs to know of a step must be in them.
"""

import copy

import torch
from accelerate.utils import is_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from unsloth_ext.common.attaching import attached_modules, settings_of
from unsloth_ext.common.wrapping import backbone_of, causal_lm_of
from unsloth_ext.latent.method import METHOD

from ..common.modules_beside import from_first_process
from .losses import AllSum, alone


STEP_DECODER = "step_decoder"  # its folder in a checkpoint


def step_decoder_of(model: nn.Module) -> PreTrainedModel:
    """A float32 copy of a causal LM in which everything is trained. Adapters are merged; latent modules are left out.

    Raises:
        ValueError: the weights are quantized.
    """
    if getattr(causal_lm_of(model), "quantization_method", None):
        raise ValueError(
            "w_step_decoder: the decoder is a copy of the model that is trained, and the model is quantized; load it "
            "without quantization"
        )
    decoder = copy.deepcopy(model)
    if is_peft_model(decoder):
        decoder = decoder.merge_and_unload()
    if settings_of(decoder, METHOD) is not None:
        for name in attached_modules(decoder, METHOD):
            delattr(backbone_of(decoder), name)
        delattr(backbone_of(decoder), METHOD.attribute)
        delattr(decoder.config, METHOD.key)
    return decoder.float().requires_grad_(True)


def same_everywhere(decoder: nn.Module, device: torch.device) -> nn.Module:
    """Move a decoder to a device, with the weights of the first process in all of them."""
    if any(p.is_meta for p in decoder.parameters()):
        decoder.to_empty(device=device)
    decoder.to(device)
    from_first_process((*decoder.parameters(), *decoder.buffers()))
    return decoder


def steps_of(trace: torch.Tensor, step_ends: torch.Tensor, count: int, eos: int, merge: bool) -> torch.Tensor:
    """The tokens that the decoder writes for each group of latent tokens: those of a step, then EOS.

    Args:
        trace (B, S): long, tokens of the steps from the first on.
        step_ends (B, K): long, the number of tokens up to the end of each step; the last number is repeated for rows with
            fewer steps.
        count: G, the number of groups.
        eos: the token that ends each.
        merge: whether the last group stands for all steps from the G-th on; else for the G-th alone.

    Returns:
        (B, G, L) long; -100 after the end, and everywhere in a group without a step.
    """
    ends = F.pad(step_ends, (1, max(count - step_ends.shape[1], 0)), value=0).cummax(1).values
    first, last = ends[:, :count], ends[:, 1 : count + 1].clone()
    if merge:
        last[:, -1] = ends[:, -1]
    lengths = last - first
    at = torch.arange(int(lengths.max()) + 1 if lengths.numel() else 1, device=trace.device)
    padded = F.pad(trace, (0, 1)).unsqueeze(1).expand(-1, count, -1)
    tokens = padded.gather(2, (first[..., None] + at).clamp(max=padded.shape[2] - 1))
    tokens = tokens.masked_fill(at == lengths[..., None], eos)
    return tokens.masked_fill((at > lengths[..., None]) | (lengths == 0)[..., None], -100)


def step_losses(
    decoder: nn.Module, embedding: nn.Module, latents: torch.Tensor, steps: torch.Tensor, all_sum: AllSum = alone
) -> torch.Tensor:
    """Cross-entropy of each step given the latent inputs that stand for it (SIM-CoT, arXiv 2509.20317, L_step).

    Args:
        decoder: from `step_decoder_of`.
        embedding: that of the model, which the decoder reads steps with.
        latents (B, G, c, d): floating point.
        steps (B, G, L): long, see `steps_of`.
        all_sum: sums a tensor over processes.

    Returns:
        (G,) float32: the mean over the tokens of a group's steps in nats, over all processes; 0 for a group without one.
    """
    there = (steps != -100).any(-1)
    sums = latents.new_zeros(steps.shape[1], dtype=torch.float32)
    if there.any():
        z, targets = latents[there], steps[there]
        known = embedding(targets[:, :-1].clamp(min=0))
        embeds = torch.cat([z, known.to(z.dtype)], dim=1).to(next(decoder.parameters()).dtype)
        logits = decoder(inputs_embeds=embeds, use_cache=False).logits[:, z.shape[1] - 1 :].float()
        loss = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
        sums = sums.index_add(0, there.nonzero()[:, 1], loss.sum(1))
    processes, total = all_sum(torch.stack([torch.ones_like(sums), step_counts(steps)]))
    return sums * processes / total.clamp(min=1)


def step_counts(steps: torch.Tensor) -> torch.Tensor:
    """The number of tokens of each group's steps: (G,) float32."""
    return (steps != -100).sum((0, 2)).float()
