"""Thinking states for the training forward: where they come from and which gradients they carry (docs/hrpo.md).

| mode        | states                                                          | extra passes | gradient into W |
|-------------|-----------------------------------------------------------------|--------------|-----------------|
| `frozen`    | those of the rollout                                            | 0            | no              |
| `rollout`   | made anew from the rollout's hidden states                      | 0            | yes             |
| `two_pass`  | from a pass without thinking                                    | 1, no grad   | yes, biased     |
| `soft_bptt` | from a pass with the rollout's states, gradient kept            | 1, with grad | (reaches LoRA)  |
| `jacobi`    | K refinements from the rollout's, then as `rollout`             | K, no grad   | yes             |

`jacobi` with K >= the longest run of thinking tokens is the exact sequential state of the present weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..common.logits import logits_of
from ..common.wrapping import backbone_of, unwrapped
from .forward import decoder_of
from .states import Warper, soft_embedding


RECOMPUTE_MODES = ("frozen", "rollout", "two_pass", "soft_bptt", "jacobi")
TOKENS_PER_CHUNK = 512  # of the (tokens, V) distributions that soft embeddings need


@dataclass(frozen=True)
class SavedThinking:
    """What a rollout keeps for training. Rows B, completion length C.

    Attributes:
        mask (B, C) bool: thinking tokens.
        states (B, C, d): fused at the rollout; for `frozen`, `soft_bptt` and `jacobi` with soft embeddings.
        hidden (B, C, d): [:, t] produced token t; for `rollout`, and `jacobi` with the projection.
    """

    mask: torch.Tensor
    states: torch.Tensor | None = None
    hidden: torch.Tensor | None = None


def saved_fields(mode: str, source: str) -> tuple[str, ...]:
    """Fields of `SavedThinking` that a mode reads beside the mask: nothing else is worth its memory."""
    if mode == "two_pass":
        return ()
    if mode == "rollout" or (mode == "jacobi" and source == "projection"):
        return ("hidden",)
    return ("states",)


def thinking_keywords(
    model: nn.Module,
    mode: str,
    saved: SavedThinking,
    warp: Warper,
    iterations: int,
    **inputs: torch.Tensor,
) -> dict[str, Any]:
    """Keywords for the forward that takes the gradient.

    Args:
        model: the (wrapped) causal LM.
        inputs: what that forward gets too: `input_ids` (B, T) and `attention_mask` (B, T), T >= C, completions last.
        warp: temperature and support of the rollout.
        iterations: K of `jacobi`.
    """
    model = unwrapped(model)  # these passes come before the one that DDP counts
    source = backbone_of(model).thinking_config.thinking_source

    def from_hidden(hidden: torch.Tensor) -> dict[str, Any]:
        if source == "projection":
            return {
                "thinking_mask": saved.mask,
                "recompute_thinking_projection": True,
                "thinking_hidden_states_cache": hidden,
            }
        return {"thinking_mask": saved.mask, "thinking_embeds": soft_states(model, hidden, saved.mask, warp)}

    from_states = {"thinking_mask": saved.mask, "thinking_embeds": saved.states}
    if mode == "frozen":
        return from_states
    if mode == "rollout":
        return from_hidden(saved.hidden)
    length = saved.mask.shape[1]
    if mode == "two_pass":
        with torch.no_grad():
            hidden = previous_hidden(model, length, **inputs)
        return from_hidden(hidden)
    if mode == "soft_bptt":
        return from_hidden(previous_hidden(model, length, **inputs, **from_states))
    if mode == "jacobi":
        with torch.no_grad():
            keywords = from_hidden(saved.hidden) if source == "projection" else from_states
            for _ in range(iterations):
                hidden = previous_hidden(model, length, **inputs, **keywords)
                keywords = from_hidden(hidden)
        return from_hidden(hidden)
    raise ValueError(f"recompute={mode!r}: choose one of {', '.join(RECOMPUTE_MODES)}")


def previous_hidden(model: nn.Module, length: int, **inputs: Any) -> torch.Tensor:
    """(B, length, d): for each of the last `length` positions the final-norm hidden state of the position before it."""
    found = []
    hook = decoder_of(model, backbone_of(model)).register_forward_hook(lambda _, __, output: found.append(output[0]))
    try:
        model(**inputs, logits_to_keep=1, use_cache=False)  # the head sees one position
    finally:
        hook.remove()
    return found[0][:, -length - 1 : -1]


def soft_states(model: nn.Module, hidden: torch.Tensor, mask: torch.Tensor, warp: Warper) -> torch.Tensor:
    """Soft-embedding states (B, C, d) of hidden states (B, C, d) where the mask is set, zero elsewhere."""
    embedding = backbone_of(model).get_input_embeddings()

    def chunk(rows: torch.Tensor) -> torch.Tensor:
        probs = warp(logits_of(model, rows).float()).softmax(-1)
        return soft_embedding(embedding, probs, int((probs > 0).sum(-1).max()) if warp.truncates else None)

    chunks = hidden[mask].split(TOKENS_PER_CHUNK)
    if torch.is_grad_enabled() and len(chunks) > 1:
        states = torch.cat([checkpoint(chunk, rows, use_reentrant=False) for rows in chunks])
    else:
        states = torch.cat([chunk(rows) for rows in chunks])
    return torch.zeros_like(hidden).masked_scatter(mask[..., None], states.to(hidden.dtype))
