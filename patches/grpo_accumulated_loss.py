"""Patch of Unsloth's GRPO loss (`grpo_accumulated_loss`), whose model forwards then get thinking states.

Upstream drops the padding, reorders the batch (left-packed rows in chunks, or all rows in one packed sequence) and
forwards only token ids. The replacement takes the keywords of the patched decoder forward in the layout of the *batch*:
`thinking_mask` (B, C) and states (B, C, d) over the last C columns of `input_ids` (B, P + C). A pre-hook on the decoder
finds the rows of each forward by their tokens and brings their states into that forward's layout. Tokens that are not a
sequence of whole rows of the batch are an error, and so is a row that is never forwarded. Pad tokens never think;
upstream identifies them by their id, at any position. Shared-prompt deduplication (PrefixGrouper) is off meanwhile.
Without thinking tensors the original runs unchanged.

A trainer uses two contexts:

    # The loss, with gradients. compute_loss takes no extra keywords, so the context holds them
    with thinking_batch(thinking_mask=..., thinking_embeds=...):
        loss = super().compute_loss(model, inputs, ...)
    # Log-probs of the old policy. The reference has no thinking states
    with thinking_forwards(model, input_ids, pad, thinking_mask=..., ...):
        out = super()._get_per_token_logps_and_entropies(model, input_ids, ...)
"""

import contextlib
import contextvars
import functools
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch

from ._thinking import KEYWORDS, take_thinking
from .grpo_log_probs import recording
from .registry import Patch, PatchError, Site, applied


NAME = "grpo_accumulated_loss"
STATES = ("thinking_embeds", "thinking_hidden_states_cache")
Batch = tuple[dict[str, Any], list[torch.Tensor]]  # keywords for the loss, and log-probs from it
_batch: contextvars.ContextVar[Batch | None] = contextvars.ContextVar("thinking_batch", default=None)


@contextlib.contextmanager
def thinking_batch(**thinking: Any) -> Iterator[list[torch.Tensor]]:
    """Pass thinking keywords to the one `grpo_accumulated_loss` call inside the context.

    Args:
        **thinking: those of `thinking_forwards`.

    Yields:
        A list to which that call appends the log-probs of its loss, in Unsloth's layout: (B, C + W), where the
        completion of row i starts at column W - (left pads of row i).

    Raises:
        TypeError: a keyword is unknown.
        PatchError: no call inside took the keywords, so the loss was computed without thinking.
    """
    unknown = thinking.keys() - set(KEYWORDS)
    if unknown:
        raise TypeError(f"thinking_batch() takes {', '.join(KEYWORDS)}; not {', '.join(sorted(unknown))}")
    given = dict(thinking)
    scored: list[Any] = []
    token = _batch.set((given, scored))
    try:
        yield scored
    finally:
        _batch.reset(token)
    if given:
        raise PatchError(f"the loss was computed without its thinking states: {NAME} is not patched, or was not called")


@contextlib.contextmanager
def thinking_forwards(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    pad_token_id: int,
    *,
    thinking_mask: torch.Tensor,
    thinking_embeds: torch.Tensor | None = None,
    recompute_thinking_projection: bool = False,
    thinking_hidden_states_cache: torch.Tensor | None = None,
) -> Iterator[None]:
    """Fuse thinking states into every forward of `model` inside the context, in any layout of the batch.

    Args:
        model: a causal LM with thinking modules, under any wrapper.
        input_ids (B, P + C): long, the batch. Forwards get its tokens other than `pad_token_id`.
        pad_token_id: the padding token.
        thinking_mask (B, C): bool, which of the last C tokens think.
        thinking_embeds (B, C, d): floating point, the state of each of them.
        recompute_thinking_projection: make the states from `thinking_hidden_states_cache` instead.
        thinking_hidden_states_cache (B, C, d): floating point, the hidden states to make them from.

    Raises:
        ValueError: shapes do not fit, the model has no thinking modules, or the tokens of a forward are not rows of the
            batch.
        PatchError: some rows were never forwarded.
    """
    states = thinking_hidden_states_cache if recompute_thinking_projection else thinking_embeds
    if states is None or states.shape[:2] != thinking_mask.shape or len(thinking_mask) != len(input_ids):
        raise ValueError(
            f"thinking_mask {tuple(thinking_mask.shape)} and states {None if states is None else tuple(states.shape)} "
            f"do not cover the end of input_ids {tuple(input_ids.shape)}"
        )
    decoders = [module for module in model.modules() if "fuse_thinking" in vars(module)]
    if len(decoders) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(decoders)} decoders with thinking modules; there must be one"
        )
    rows = _Rows(input_ids, pad_token_id, thinking_mask, states, STATES[recompute_thinking_projection])
    handle = decoders[0].register_forward_pre_hook(rows.hand_over, with_kwargs=True)
    on_unsloth = "unsloth.utils.prefix_grouper" in sys.modules
    try:
        with applied("unsloth_prefix_grouper") if on_unsloth else contextlib.nullcontext():
            yield
    finally:
        handle.remove()
    if rows.unseen:
        raise PatchError(f"rows {sorted(rows.unseen)} of the batch were never forwarded with their thinking states")


class _Rows:
    """The batch without padding, row after row: tokens (N,), mask (N,) and states (N, d)."""

    def __init__(self, input_ids, pad_token_id, thinking_mask, states, keyword):
        keep = input_ids != pad_token_id
        before = input_ids.shape[1] - thinking_mask.shape[1]
        self.pad, self.keyword = pad_token_id, keyword
        self.ids = input_ids[keep]
        self.thinking_mask = torch.nn.functional.pad(thinking_mask.bool(), (before, 0))[keep]
        self.states = torch.nn.functional.pad(states, (0, 0, before, 0))[keep]
        self.edges = [0, *keep.sum(dim=1).cumsum(dim=0).tolist()]
        self.row, self.unseen = 0, {row for row, n in enumerate(keep.sum(dim=1).tolist()) if n}

    def hand_over(self, decoder, args, kwargs):
        """Forward pre-hook: add the keywords for the tokens of this call, input_ids (b, T)."""
        input_ids = args[0] if args else kwargs.get("input_ids")
        if input_ids is None:
            raise ValueError("a forward with inputs_embeds inside thinking_forwards: its tokens cannot be known")
        at = (input_ids != self.pad).nonzero(as_tuple=True)
        span = self._find(input_ids[at])
        thinking_mask = torch.zeros_like(input_ids, dtype=torch.bool).index_put(at, self.thinking_mask[span])
        states = self.states.new_zeros(*input_ids.shape, self.states.shape[-1]).index_put(at, self.states[span])
        recompute = self.keyword == STATES[1]
        kwargs |= {"thinking_mask": thinking_mask, self.keyword: states, "recompute_thinking_projection": recompute}
        return args, kwargs

    def _find(self, ids: torch.Tensor) -> slice:
        """Return where in the batch these tokens (n,) are. They must be whole rows. The search starts after the last
        call's rows.
        """
        count = len(self.edges) - 1
        for first in (*range(self.row, count), *range(self.row)):
            start, end = self.edges[first], self.edges[first] + len(ids)
            if end in self.edges[first + 1 :] and torch.equal(self.ids[start:end], ids):
                last = self.edges.index(end, first + 1)
                self.row = last % count
                self.unseen -= set(range(first, last))
                return slice(start, end)
        raise ValueError(f"a forward over {len(ids)} tokens that are not rows of the batch with thinking states")


def _sites(*owners: Any) -> list[Site]:
    """Return the generated trainer's own copy. To patch `unsloth_zoo` after its import would have no effect."""
    import trl
    import unsloth  # noqa: F401 - it replaces trl.GRPOTrainer

    sites = []
    for trainer in owners or (trl.GRPOTrainer,):
        for cls in inspect.getmro(trainer):
            module = sys.modules.get(getattr(vars(cls).get("compute_loss"), "__module__", ""))
            if hasattr(module, NAME) and (module, NAME) not in sites:
                sites.append((module, NAME))
    return sites


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def grpo_accumulated_loss(trainer, input_ids, *args, **kwargs):
        handed_over, scored = _batch.get() or ({}, [])
        thinking = take_thinking(kwargs) or dict(handed_over)
        handed_over.clear()
        if thinking.get("thinking_mask") is None:
            return original(trainer, input_ids, *args, **kwargs)
        model = trainer.accelerator.unwrap_model(trainer.model)
        pad = trainer.processing_class.pad_token_id
        with thinking_forwards(model, input_ids, pad, **thinking), recording(original, scored):
            return original(trainer, input_ids, *args, **kwargs)

    return grpo_accumulated_loss


PATCH = Patch(
    name="grpo_accumulated_loss",
    package="unsloth_zoo",
    target="UnslothGRPOTrainer.grpo_accumulated_loss",
    parameters=(
        "trainer",
        "input_ids",
        "attention_mask",
        "logits_to_keep",
        "completion_mask",
        "advantages",
        "old_logps",
        "ref_logps",
        "n_chunks",
        "tool_mask",
        "kwargs",
    ),
    sites=_sites,
    wrap=_wrap,
    places=("unsloth_zoo/rl_replacements.py:grpo_accumulated_loss",),
    effect="The forwards inside Unsloth's GRPO loss get the batch's thinking states, in the layout of each forward.",
    reason="HRPO on Unsloth: the loss must see the thinking states of the rollout",
    upstream="no upstream issue is known: the keywords belong to this project",
    removable="never, while HRPO trains on Unsloth",
)
