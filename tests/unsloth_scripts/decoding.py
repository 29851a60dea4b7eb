"""Hybrid decoding under Unsloth: the log-probs of the rollout against those of the training forward."""

from tests import unsloth_on_cpu  # noqa: F401 - before all else


# isort: split
import os

import torch
from unsloth.models import _decode_graphs

import patches
from patches.unsloth_hidden_states_wrapper import ATTRIBUTE
from tests import tiny
from unsloth_ext import DelimiterMatcher, backbone_of, hybrid_generate


def left_pack(x, order):
    return x.gather(1, order if x.dim() == 2 else order[..., None].expand(-1, -1, x.shape[-1]))


def compare(model, stock, source: str) -> dict:
    """Largest |rollout - training| log-prob in both layouts, and whether the stock model decodes the same tokens."""
    for net in (model, stock):
        backbone_of(net).thinking_config.thinking_source = source
    torch.manual_seed(0)
    ids = torch.randint(3, 40, (4, 7))
    attention = torch.ones_like(ids)
    attention[0, :3] = attention[2, :5] = 0
    ids = ids.masked_fill(attention == 0, 0)
    matcher = DelimiterMatcher(tiny.tokenizer(), "##", 64)
    settings = {"max_new_tokens": 16, "do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": 1}
    settings |= {"suppress_tokens": [0]}  # Unsloth takes a sampled pad token for padding

    def roll(net):
        torch.manual_seed(1)
        return hybrid_generate(
            net,
            ids,
            matcher,
            attention_mask=attention,
            keep=("thinking_states", "hidden_states", "log_probs"),
            return_trace=True,
            **settings,
        )

    model.train()  # as a trainer leaves it
    before = _decode_graphs.ENABLED, os.environ.get("UNSLOTH_RETURN_HIDDEN_STATES")
    out, trace = roll(model)
    after = _decode_graphs.ENABLED, os.environ.get("UNSLOTH_RETURN_HIDDEN_STATES")
    left = [patch.name for patch in patches.status().values() if patches.get(patch.name).scoped and patch.applied]
    left += [ATTRIBUTE] if ATTRIBUTE in vars(model) else []
    stock_out, _ = roll(stock)
    completion = out[:, 7:]
    real = torch.cat([attention, _until_eos(completion)], 1).bool()
    states = [{"thinking_embeds": trace.thinking_states}]
    if source == "projection":
        states.append({"recompute_thinking_projection": True, "thinking_hidden_states_cache": trace.hidden_states})
    found = {"left_padded": [], "left_packed": []}
    order = torch.argsort(real, dim=1, descending=True, stable=True)
    packed = left_pack(out, order)
    for how in states:
        kwargs = {"thinking_mask": trace.thinking_mask, **how}
        model.eval()
        positions = (real.long().cumsum(1) - 1).clamp(min=0)
        logits = model(input_ids=out, attention_mask=real.long(), position_ids=positions, **kwargs).logits
        found["left_padded"].append(_worst(logits[:, 6:-1], completion, trace.log_probs, real[:, 7:]))
        model.train()
        whole = {
            key: left_pack(torch.nn.functional.pad(value, (*(0, 0) * (value.dim() - 2), 7, 0)), order)
            for key, value in kwargs.items()
            if isinstance(value, torch.Tensor)
        }
        logits = model(input_ids=packed, **{**kwargs, **whole}).logits
        logits = left_pack(logits, torch.argsort(order, dim=1))  # each position back to its column
        found["left_packed"].append(_worst(logits[:, 6:-1], completion, trace.log_probs, real[:, 7:]))
    return {
        "left_padded": max(found["left_padded"]),
        "left_packed": max(found["left_packed"]),
        "thinking": trace.thinking_mask.float().mean().item(),
        "same_tokens": torch.equal(out, stock_out),
        "switches_restored": before == after and not left,
        "is_inference": any(x.is_inference() for x in vars(trace).values() if x is not None),
    }


def _until_eos(completion):
    eos = completion == 1
    return (eos.cumsum(1) - eos.int() == 0).long()


def _worst(logits, tokens, log_probs, real) -> float:
    logits[..., 0] = -torch.inf  # the suppressed token
    found = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    return (found - log_probs)[real].abs().max().item()
