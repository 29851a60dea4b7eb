"""Probes of latent tokens: the tokens that the LM head reads in them, and their KV similarity to a trace (ours)."""

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch.nn import functional as F
from transformers import DynamicCache, PreTrainedModel

from ..common.compat import CACHE
from ..common.wrapping import backbone_of
from ..kv_compression.compression import KVScoring
from ..kv_compression.trace import compressed_trace
from .phase import LatentState, latent_phase


@torch.no_grad()
def probe_latents(
    model: PreTrainedModel | PeftModel, state: LatentState, k: int = 5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply the LM head to the hidden state of each latent token (logit lens, ours).

    Args:
        model: a causal LM with latent tokens, wrapped by PEFT or not.
        state: the result of a latent phase.
        k: the number of tokens to return.

    Returns:
        Ids (B, M, k) long and probabilities (B, M, k) fp32 of the most likely tokens, in descending order.
    """
    head = model.get_output_embeddings()
    probabilities = head(state.hidden_states.to(head.weight.dtype)).float().softmax(dim=-1)
    top = probabilities.topk(k, dim=-1)
    return top.indices, top.values


@dataclass(frozen=True)
class KVSimilarity:
    """Cosine similarities of the keys and values of latent tokens to those of the teacher's trace, averaged over KV
    heads.

    Attributes:
        keys, values (L, B, M, T): fp32, to every token of the trace. Zero where `trace_mask` is not set.
        kept_keys, kept_values (L, B, M): fp32, to what the compression keeps in the same slot, which L_KV compares.
            Zero where `valid` is not set.
        trace_mask (B, T): bool.
        valid (B, M): bool.
    """

    keys: torch.Tensor
    values: torch.Tensor
    kept_keys: torch.Tensor
    kept_values: torch.Tensor
    trace_mask: torch.Tensor
    valid: torch.Tensor


@torch.no_grad()
def kv_similarity(
    model: PreTrainedModel | PeftModel,
    question_ids: torch.Tensor,
    question_mask: torch.Tensor,
    teacher_ids: torch.Tensor,
    trace_mask: torch.Tensor,
    answer_mask: torch.Tensor,
    scoring: KVScoring | None = None,
) -> KVSimilarity:
    """Run the teacher and the latent phase on the same questions and compare their caches.

    Args:
        model: a causal LM with latent tokens, wrapped by PEFT or not.
        question_ids (B, Q): long, left-padded.
        question_mask (B, Q): long or bool.
        teacher_ids (B, S): long, right-padded, what the teacher reads after the question.
        trace_mask (B, S): bool, the tokens of the trace.
        answer_mask (B, S): bool, the tokens of the answer.
        scoring: how the trace is compressed. None means the defaults.

    Returns:
        The similarities.
    """
    backbone = backbone_of(model)
    width, count = question_ids.shape[1], backbone.latent_config.num_latents
    teacher_mask = trace_mask.bool() | answer_mask.bool()
    mask = torch.cat([question_mask.bool(), teacher_mask], dim=1).long()
    trace, answer = (F.pad(x.bool(), (width, 0)) for x in (trace_mask, answer_mask))
    cache = DynamicCache(config=backbone.config)
    with compressed_trace(model, trace, answer, count, scoring) as kept:
        model(
            input_ids=torch.cat([question_ids, teacher_ids], dim=1),
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=True,
            **{CACHE: cache},
        )
    latent = latent_phase(model, question_ids, question_mask).latent_kv()
    length = int(trace_mask.any(0).sum())
    real, valid = trace_mask[:, :length].bool(), kept[0].valid
    found: dict[str, list[torch.Tensor]] = {name: [] for name in ("keys", "values", "kept_keys", "kept_values")}
    for ours, layer, chosen in zip(latent, cache.layers, kept, strict=True):
        for name, latents in zip(("keys", "values"), ours, strict=True):
            teacher = getattr(layer, name)[:, :, width : width + length]
            cosines = F.normalize(latents.float(), dim=-1) @ F.normalize(teacher.float(), dim=-1).transpose(-1, -2)
            found[name].append(cosines.mean(1) * real[:, None])
            slots = F.cosine_similarity(latents.float(), getattr(chosen, name).float(), dim=-1)
            found[f"kept_{name}"].append(slots.mean(1) * valid)
    return KVSimilarity(**{name: torch.stack(layers) for name, layers in found.items()}, trace_mask=real, valid=valid)
