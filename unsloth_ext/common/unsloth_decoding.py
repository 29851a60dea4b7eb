"""Support for Unsloth's fast decoding path.

Unsloth multiplies by the LM head's weight without calling the module, so no hook sees the last hidden state. Under its
switch `UNSLOTH_RETURN_HIDDEN_STATES=1` its forwards return that state instead of the logits. The first logits processor
then applies the head. Decoding from captured CUDA graphs would skip our embedding hook, so it is off meanwhile.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor

import patches


def on_unsloth(model: nn.Module) -> bool:
    """Return whether Unsloth's fast forwards run this causal LM, and not FastModel's or transformers' own."""
    return "unsloth" in sys.modules and getattr(model, "_unsloth_fast_path", False)


@contextlib.contextmanager
def without_decode_graphs() -> Iterator[None]:
    """Turn off decoding from CUDA graphs inside the context, if Unsloth is loaded."""
    loaded = "unsloth.models._decode_graphs" in sys.modules
    with patches.applied("unsloth_decode_graphs") if loaded else contextlib.nullcontext():
        yield


def returning_hidden_states(model: nn.Module) -> "_HiddenStates | None":
    """Return a context in which Unsloth's forwards return hidden states instead of logits; None on a stock model."""
    return _HiddenStates(model) if on_unsloth(model) else None


class _HiddenStates(contextlib.ExitStack):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def __enter__(self):
        super().__enter__()
        self.enter_context(patches.applied("unsloth_hidden_states"))
        self.enter_context(patches.applied("unsloth_hidden_states_wrapper", self.model))
        return self

    def processor(self, session: Any) -> LogitsProcessor:
        """Return the first logits processor: it shows hidden states (B, d) to `session.see_hidden` and makes logits (B,
        V).
        """
        return _Head(self.model, session.see_hidden)


class _Head(LogitsProcessor):
    def __init__(self, model: nn.Module, see_hidden: Callable):
        from unsloth.models.llama import apply_logit_transforms, resolve_logit_scaling

        self.head, self.see_hidden = model.get_output_embeddings(), see_hidden
        self.finish = lambda logits: apply_logit_transforms(logits, *resolve_logit_scaling(model.config))

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        weight = self.head.weight
        if scores.shape[-1] != weight.shape[1]:
            raise RuntimeError(
                f"Unsloth returned scores {tuple(scores.shape)}, not hidden states (B, {weight.shape[1]})"
            )
        # `_sample` has cast them to fp32; Unsloth multiplies in the model's dtype
        hidden = scores.to(weight.dtype)
        self.see_hidden(self.head, (hidden[:, None],))
        return self.finish(self.head(hidden)).float()
