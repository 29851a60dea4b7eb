"""Patch of TRL's fused LM head for machines without a GPU: a chunked PyTorch version of its Triton kernel.

TRL 1.15 scores every token with `trl.kernels.ChunkedLogProbFunction`, whose Triton kernels need a GPU. Without Triton
the name is None, and every loss fails with "'NoneType' object has no attribute 'apply'". The replacement has the same
arguments and results. CUDA tensors still use the original.
"""

import types
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from .registry import _MARK as MARK
from .registry import Patch, PatchError, Site, apply


NAME = "fused_lm_head"
TOKENS_PER_CHUNK = 2048


def ensure() -> None:
    """Apply this patch, except on Unsloth's CPU backend, which has a replacement of its own."""
    if not _unsloth_did_it():
        apply(NAME)


def _unsloth_did_it() -> bool:
    import trl.trainer.utils as trl_utils

    return getattr(trl_utils._ChunkedLogProbFunction, "_unsloth_cpu_dispatch", False)


def _sites(*owners: Any) -> list[Site]:
    import trl.trainer.utils as trl_utils

    if _unsloth_did_it():
        raise PatchError(f"patch {NAME!r} is not needed: Unsloth's CPU backend has replaced TRL's fused LM head")
    holder = trl_utils._ChunkedLogProbFunction
    if holder is None or hasattr(holder, MARK):  # None without Triton, or our replacement for it
        return [(trl_utils, "_ChunkedLogProbFunction")]
    return [(holder, "apply")]


def _without_triton(*_):
    raise RuntimeError("TRL's fused LM head needs Triton on this device")


def _forward_signature(
    ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
): ...


def _chunk(hidden, weight, bias, targets, temperature, softcap, logit_scale, outputs):
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else hidden.dtype
    bias = None if bias is None else bias.to(dtype)
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias).float() * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits / temperature
    all_log_probs = logits.log_softmax(-1)
    log_probs = all_log_probs.gather(-1, targets[:, None]).squeeze(-1)
    entropy = -(all_log_probs.exp() * all_log_probs).sum(-1) if "entropy" in outputs else None
    with torch.no_grad():  # these three carry no gradient upstream either
        log_sum_sq = (2 * all_log_probs).logsumexp(-1) if "log_sum_sq_probs" in outputs else None
        mean_logits = logits.mean(-1) if "mean_logits" in outputs else None
        is_top1 = logits.argmax(-1) == targets if "is_top1" in outputs else None
    return log_probs, entropy, log_sum_sq, mean_logits, is_top1


def _signed(owner: Any, attribute: str) -> Any:
    return _forward_signature if getattr(owner, attribute) is None else owner.forward


def _wrap(original: Any) -> Any:
    """Wrap `ChunkedLogProbFunction.apply`, or the None that stands for the class without Triton."""
    if original is None:
        return types.SimpleNamespace(apply=_wrap(_without_triton).__func__, forward=_forward_signature)

    def apply(
        hidden,
        weight,
        bias,
        targets,
        temperature,
        chunk_size,
        final_logit_softcapping=None,
        logit_scale=1.0,
        outputs=("entropy", "log_sum_sq_probs", "mean_logits", "is_top1"),
    ):
        """Compute log-probs (N,) and the optional statistics of TRL's kernel for hidden (N, d), weight (V, d) and
        targets (N,).
        """
        if hidden.device.type != "cpu":
            return original(
                hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
            )
        args = (weight, bias)
        rest = (temperature, final_logit_softcapping, logit_scale, outputs)
        if len(hidden) <= TOKENS_PER_CHUNK:
            return _chunk(hidden, *args, targets, *rest)
        # Recompute each chunk's logits in the backward pass, so that only one chunk's logits are in memory at a time
        chunks = [
            checkpoint(_chunk, h, *args, t, *rest, use_reentrant=False)
            for h, t in zip(hidden.split(TOKENS_PER_CHUNK), targets.split(TOKENS_PER_CHUNK), strict=True)
        ]
        return tuple(None if c[0] is None else torch.cat(c) for c in zip(*chunks, strict=True))

    return staticmethod(apply)


PATCH = Patch(
    name=NAME,
    package="trl",
    target="trl.trainer.utils._ChunkedLogProbFunction.apply",
    parameters=(
        "ctx",
        "hidden",
        "weight",
        "bias",
        "targets",
        "temperature",
        "chunk_size",
        "final_logit_softcapping",
        "logit_scale",
        "outputs",
    ),
    signed=_signed,
    sites=_sites,
    wrap=_wrap,
    places=("trl/kernels/chunked_logprob.py:ChunkedLogProbFunction",),
    effect="On CPU tensors, a chunked PyTorch version computes what the Triton kernel would.",
    reason="training on a CPU: TRL's loss kernel is written in Triton, which needs a GPU",
    upstream="https://github.com/huggingface/trl/issues/7244",
    removable="when TRL's own loss head runs on a CPU",
)
