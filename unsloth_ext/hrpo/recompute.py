"""Thinking states for the training forward (HRPO, arXiv 2505.18454). docs/hrpo.md explains the modes.

| mode        | states                                                          | extra passes | gradient into W |
|-------------|-----------------------------------------------------------------|--------------|-----------------|
| `frozen`    | those of the rollout                                            | 0            | no              |
| `rollout`   | recomputed from the rollout's hidden states                     | 0            | yes             |
| `two_pass`  | from a pass without thinking                                    | 1, no grad   | yes, biased     |
| `soft_bptt` | from a pass with the rollout's states, gradient kept            | 1, with grad | (reaches LoRA)  |
| `jacobi`    | K refinements of the rollout's, then as `rollout`               | K, no grad   | yes             |

`jacobi` with K >= the longest run of thinking tokens gives the exact sequential states of the current weights.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ..common.logits import logits_of
from ..common.sharding import begin_at_root
from ..common.wrapping import backbone_of, unwrapped
from .decoding import ThinkingTrace
from .forward import decoder_of
from .soft_tokens import SOFT_FIELDS
from .states import SOFT_SOURCES, TOKENS_PER_CHUNK, Warper, soft_embedding


RECOMPUTE_MODES = ("frozen", "rollout", "two_pass", "soft_bptt", "jacobi")


def trace_fields(mode: str, source: str) -> tuple[str, ...]:
    """Return the tensors of `ThinkingTrace` that a recompute mode reads beside the mask. A rollout need not keep the
    others.

    Args:
        mode: one of `RECOMPUTE_MODES`.
        source: `thinking_source` of the model's `ThinkingConfig`.

    Returns:
        Nothing for `two_pass`; `"hidden_states"` for `rollout`, and for `jacobi` with the projection; else
        `"thinking_states"`, and for soft tokens what their likelihood needs.

    Raises:
        ValueError: `mode` is not `frozen`, and the source is one of soft tokens.
    """
    if source in SOFT_SOURCES:
        if mode != "frozen":
            raise ValueError(
                f"recompute={mode!r} with thinking_source={source!r}: a soft token is fed as it was drawn, and its "
                "likelihood is recomputed; set recompute='frozen'"
            )
        return ("thinking_states", *SOFT_FIELDS[source])
    if mode == "two_pass":
        return ()
    if mode == "rollout" or (mode == "jacobi" and source == "projection"):
        return ("hidden_states",)
    return ("thinking_states",)


def thinking_keywords(
    model: nn.Module,
    mode: str,
    trace: ThinkingTrace,
    warp: Warper,
    iterations: int,
    **inputs: torch.Tensor,
) -> dict[str, Any]:
    """Build the thinking keywords of the training forward, under the names of the patched `LlamaModel_fast_forward`.

    Only this function translates our names to those: `thinking_states` are passed as `thinking_embeds`, and
    `hidden_states` as `thinking_hidden_states_cache`.

    Args:
        model: the (wrapped) causal LM.
        mode: one of `RECOMPUTE_MODES`.
        trace: what the rollout kept, (B, C) and (B, C, d). See `trace_fields`.
        warp: the temperature and support of the rollout.
        iterations: K of `jacobi`.
        **inputs: the other inputs of that forward: `input_ids` (B, T) and `attention_mask` (B, T), both long, with T >=
            C and completions last.

    Returns:
        `thinking_mask` (B, C) bool with either `thinking_embeds` (B, C, d), or `thinking_hidden_states_cache` (B, C, d)
        and `recompute_thinking_projection=True`. States are in the model's dtype.

    Raises:
        ValueError: `mode` is unknown.
    """
    model = unwrapped(model)  # DDP must only count the training pass, which comes after these
    source = backbone_of(model).thinking_config.thinking_source

    thinking_mask = trace.thinking_mask

    def from_hidden(hidden_states: torch.Tensor) -> dict[str, Any]:
        if source == "projection":
            return {
                "thinking_mask": thinking_mask,
                "recompute_thinking_projection": True,
                "thinking_hidden_states_cache": hidden_states,
            }
        return {
            "thinking_mask": thinking_mask,
            "thinking_embeds": soft_states(model, hidden_states, thinking_mask, warp),
        }

    from_states = {"thinking_mask": thinking_mask, "thinking_embeds": trace.thinking_states}
    if mode == "frozen":
        return from_states
    if mode == "rollout":
        return from_hidden(trace.hidden_states)
    length = thinking_mask.shape[1]
    if mode == "two_pass":
        with torch.no_grad():
            hidden_states = previous_hidden(model, length, **inputs)
        return from_hidden(hidden_states)
    if mode == "soft_bptt":
        return from_hidden(previous_hidden(model, length, **inputs, **from_states))
    if mode == "jacobi":
        with torch.no_grad():
            keywords = from_hidden(trace.hidden_states) if source == "projection" else from_states
            for _ in range(iterations):
                hidden_states = previous_hidden(model, length, **inputs, **keywords)
                keywords = from_hidden(hidden_states)
        return from_hidden(hidden_states)
    raise ValueError(f"recompute={mode!r}: choose one of {', '.join(RECOMPUTE_MODES)}")


def previous_hidden(model: nn.Module, length: int, **inputs: Any) -> torch.Tensor:
    """Return, for each of the last `length` positions, the final-norm hidden state of the position before it.

    Args:
        model: the causal LM.
        length: the number of positions.
        **inputs: keywords for the forward.

    Returns:
        (B, length, d) in the model's dtype.
    """
    found = []
    hook = decoder_of(model, backbone_of(model)).register_forward_hook(lambda _, __, output: found.append(output[0]))
    try:
        model(**inputs, logits_to_keep=1, use_cache=False)  # run the head on one position only
    finally:
        hook.remove()
    return found[0][:, -length - 1 : -1]


def soft_states(
    model: nn.Module, hidden_states: torch.Tensor, thinking_mask: torch.Tensor, warp: Warper
) -> torch.Tensor:
    """Compute soft-embedding thinking states.

    Args:
        model: the causal LM.
        hidden_states (B, C, d): in the model's dtype.
        thinking_mask (B, C): bool.
        warp: the temperature and support of the rollout.

    Returns:
        (B, C, d) in the dtype of `hidden_states`, zero where the mask is not set.
    """
    begin_at_root(model)
    embedding = backbone_of(model).get_input_embeddings()

    def chunk(rows: torch.Tensor) -> torch.Tensor:
        probs = warp(logits_of(model, rows).float()).softmax(-1)
        return soft_embedding(embedding, probs, int((probs > 0).sum(-1).max()) if warp.truncates else None)

    chunks = hidden_states[thinking_mask].split(TOKENS_PER_CHUNK)
    if torch.is_grad_enabled() and len(chunks) > 1:
        states = torch.cat([checkpoint(chunk, rows, use_reentrant=False) for rows in chunks])
    else:
        states = torch.cat([chunk(rows) for rows in chunks])
    return torch.zeros_like(hidden_states).masked_scatter(thinking_mask[..., None], states.to(hidden_states.dtype))
