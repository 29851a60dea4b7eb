"""Hybrid decoding, which samples tokens and feeds each thinking token as `fused(E[x], s)` (HRPO, arXiv 2505.18454).

The token's embedding E[x] is replaced by its fusion with a thinking state s (sec. 3 of the paper). transformers' own
sampling loop runs unchanged (`generate(..., custom_generate=hybrid_decode)`). Four hooks follow it: a pre-hook on the
LM head reads the hidden state, the last logits processor reads the warped distribution, the stopping criteria read the
sampled token, and a hook on the input embedding fuses the state into the next forward. So greedy and sampled decoding,
EOS, `num_return_sequences`, streamers, stopping criteria and scores are transformers' own. Rows that have ended leave
the forwards where this changes nothing that is returned (`live_rows`).

Soft tokens (`soft_tokens`) are drawn by a logits processor before all others, from the model's own logits. The last one
then leaves one token to each row that thinks: the one that stands for the soft token.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessor, PreTrainedModel
from transformers.generation import (
    GenerationMode,
    LogitsProcessorList,
    StoppingCriteriaList,
    StopStringCriteria,
)

from ..common.ablations import ABLATIONS
from ..common.attaching import check_attached
from ..common.compat import CACHE
from ..common.delimiter import DelimiterMatcher
from ..common.generation_arguments import check, check_context, refuse_empty, samplers_count, settle
from ..common.padded_batches import check_batches
from ..common.sharding import is_whole
from ..common.unsloth_decoding import returning_hidden_states, without_decode_graphs
from ..common.wrapping import backbone_of
from .live_rows import LiveRows, can_drop_rows
from .method import METHOD
from .soft_tokens import SOFT_FIELDS, SoftToken, SoftTokens
from .states import SOFT_SOURCES, Warper, project, soft_embedding


SOFT_KEPT = tuple(name for names in SOFT_FIELDS.values() for name in names)
KEPT = ("thinking_states", "hidden_states", "log_probs", *SOFT_KEPT)  # recorded on request; the mask always is


@dataclass
class ThinkingTrace:
    """The record of a hybrid decode. C is the number of decoded tokens. Rows are those of the returned sequences.

    Only the mask has a meaning after the end of a row, which is not decoded any further.

    Attributes:
        thinking_mask (B, C): bool, the tokens before the delimiter is complete and before the row ends.
        thinking_states (B, C, d): the state fused into each token, in the model's dtype, and zero for other tokens.
            None unless requested.
        hidden_states (B, C, d): the hidden state that produced each token, in the model's dtype. None unless requested.
        log_probs (B, C): fp32, of each token under the distribution it was drawn from, and the log-likelihood of each soft
            token. None unless requested.
        noise_std (B, C): fp32, the standard deviation of the noise of Gaussian soft tokens. None unless requested.
        candidates (B, C, k): long, the tokens that Gumbel soft tokens mix. None unless requested.
        gumbels (B, C, k): fp32, their noised log-probabilities, minus infinity for tokens that top-p drops. None unless
            requested.
    """

    thinking_mask: torch.Tensor
    thinking_states: torch.Tensor | None = None
    hidden_states: torch.Tensor | None = None
    log_probs: torch.Tensor | None = None
    noise_std: torch.Tensor | None = None
    candidates: torch.Tensor | None = None
    gumbels: torch.Tensor | None = None


class HybridSession:
    """The state of one hybrid decode.

    Args:
        model: a causal LM with thinking modules, wrapped by PEFT or not.
        matcher: finds the delimiter that ends the thinking.
        keep: the tensors of `ThinkingTrace` to record beside the mask.
        ablation: replaces the thinking states, see `hybrid_generate`. None leaves them.
        streamer: as for `generate`.
        synced_gpus: as for `generate`.

    Raises:
        ValueError: the model has no thinking modules, or `keep` or `ablation` is unknown.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        matcher: DelimiterMatcher,
        keep: tuple[str, ...] = (),
        ablation: str | None = None,
        streamer: Any = None,
        synced_gpus: bool | None = None,
    ):
        check_attached(model, METHOD)
        if ablation is not None and ablation not in ABLATIONS:
            raise ValueError(f"ablation={ablation!r}: choose one of {', '.join(ABLATIONS)}, off")
        if unknown := [name for name in keep if name not in KEPT]:
            raise ValueError(f"keep: {unknown[0]!r}: choose from {', '.join(KEPT)}")
        self.matcher, self.keep, self.ablation = matcher, keep, ablation
        self.streamer, self.synced_gpus = streamer, synced_gpus
        self.backbone = backbone_of(model)
        self.embedding = self.backbone.get_input_embeddings()
        self.lm_head = model.get_output_embeddings()
        self.source = self.backbone.thinking_config.thinking_source
        self.needs_hidden = self.source == "projection" or "hidden_states" in keep
        self.soft = self.source in SOFT_SOURCES
        if other := [name for name in keep if name in SOFT_KEPT and name not in SOFT_FIELDS.get(self.source, ())]:
            raise ValueError(f"keep: {other[0]!r}: a model with thinking_source={self.source!r} has none")
        self._masks: list[torch.Tensor] = []
        self._thinking_states: list[torch.Tensor] = []
        self._hidden_states: list[torch.Tensor] = []
        self._log_probs: list[torch.Tensor] = []
        self._soft_kept: list[dict[str, torch.Tensor]] = []
        self._soft_token: SoftToken | None = None
        self._last_hidden: torch.Tensor | None = None
        self._pending: tuple[torch.Tensor, torch.Tensor | None] | None = None
        self._matched: torch.Tensor | None = None
        self.live = LiveRows()

    # -- the hooks, in the order of one step ------------------------------------------------------------------------

    def see_hidden(self, _: nn.Module, args: tuple) -> None:
        """Pre-hook of the LM head: store the last of the hidden states (B, T, d) in `args`, of the live rows."""
        self._last_hidden = self.live.widen(args[0][:, -1].clone())  # a view would keep the whole prefill alive

    def see_logits(self, logits: torch.Tensor) -> None:
        """Draw soft tokens from the model's logits (B, V), fp32."""
        self._soft_token = self._soft_tokens.draw(logits)

    def see_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Store the warped scores of the token to be chosen.

        Args:
            scores (B, V): fp32.

        Returns:
            (B, V) fp32, the scores that it is chosen by. Where a row thinks in soft tokens, only their token is possible.
        """
        self._scores = scores
        if self._soft_token is None:
            return scores
        only = torch.full_like(scores, -torch.inf).scatter(-1, self._soft_token.token[:, None], 0.0)
        return only if not self._masks else torch.where(self._masks[-1][:, None], only, scores)

    def see_token(self, tokens: torch.Tensor, done: torch.Tensor) -> None:
        """Record the chosen tokens and prepare their thinking states. Nothing here waits for the device.

        Args:
            tokens (B,): long, the chosen tokens.
            done (B,): bool, the rows that end with them.
        """
        if self._matched is None:
            self._matched = torch.zeros_like(tokens)
            self.live.ended = torch.zeros_like(tokens, dtype=torch.bool)
        self._matched = self.matcher.step(self._matched, tokens)
        ended = self.live.ended
        if self.eos is not None:
            ended = ended | (tokens[:, None] == self.eos).any(-1)
        self._masks.append((self._matched != self.matcher.done) & ~ended)
        self.live.ended = ended | done  # e.g. by a stop string, which ends the thinking after this token
        if "log_probs" in self.keep:
            self._log_probs.append(self._scores.log_softmax(-1).gather(-1, tokens[:, None]).squeeze(-1))
        if "hidden_states" in self.keep:
            self._hidden_states.append(self._last_hidden)
        if self._soft_token is not None:
            self._take_soft_token(self._soft_token)
            return
        if self.source == "projection":
            self._pending = (self._last_hidden, None)
            return
        probs = (self.warper(self._scores) if self.warp else self._scores).softmax(-1)
        count = (probs > 0).sum(-1).max().to("cpu", non_blocking=True) if self.warper.truncates else None
        self._pending = (probs, count)  # `count` is read after the loop's stopping check, which synchronises

    def fuse(self, _: nn.Module, args: tuple, embeds: torch.Tensor) -> torch.Tensor | None:
        """Hook of the input embedding: fuse the pending states into the embeddings of the next tokens.

        Args:
            args: the arguments of the embedding, which are not used.
            embeds (B', T, d): in the model's dtype, of the tokens to be fed, in the live rows. T > 1 after the prefill
                means that there is no cache.

        Returns:
            (B', T, d) in the same dtype, or None for the prompt, which does not think.
        """
        if not self._masks:
            return None
        if self._pending is not None:
            basis, count = self._pending
            self._thinking_states.append(self.live.widen(self._ablated(self._state(basis[self.live.rows], count))))
            self._pending = None
        if not self._thinking_states:  # these texts have ended, and the forward only serves other processes
            return None
        span = min(embeds.shape[1], len(self._masks))
        thinking_mask, thinking_states = (
            torch.stack([step[self.live.rows] for step in steps[-span:]], dim=1)
            for steps in (self._masks, self._thinking_states)
        )
        if "thinking_states" not in self.keep and embeds.shape[1] == 1:
            self._thinking_states.clear()
        return self.backbone.fuse_thinking(embeds, thinking_mask, thinking_states)

    # -- the thinking state ---------------------------------------------------------------------------------------

    def _take_soft_token(self, soft: SoftToken) -> None:
        self._pending = (soft.state, None)
        self._soft_kept.append(soft.kept)
        if "log_probs" in self.keep:
            thinks = self._masks[-1]
            ends = ~thinks & self._masks[-2] if len(self._masks) > 1 else ~thinks
            found = torch.where(ends, soft.end_log_prob, self._log_probs[-1])
            self._log_probs[-1] = torch.where(thinks, soft.log_prob, found).float()

    def _state(self, basis: torch.Tensor, count: torch.Tensor | None) -> torch.Tensor:
        if self.soft:
            return basis
        if self.source == "projection":
            return project(self.backbone, basis)
        return soft_embedding(self.embedding, basis, None if count is None else int(count))

    def _ablated(self, state: torch.Tensor) -> torch.Tensor:
        return ABLATIONS[self.ablation](state) if self.ablation else state

    def prepare(self, config: GenerationConfig) -> None:
        """Read the settings of the session from the generation config."""
        self.eos = getattr(config, "_eos_token_tensor", None)
        self.warper = Warper.of(config)
        self.warp = not config.do_sample  # sampling warps in the loop, greedy decoding does not
        if self.soft:
            self._soft_tokens = SoftTokens(self.backbone, noisy=bool(config.do_sample))

    def trace(self) -> ThinkingTrace:
        """Return the record so far. Its tensors are not inference tensors, so training may use them."""
        thinking_states = None
        if "thinking_states" in self.keep:
            # The last token is never fed, so its state is zero. A soft token has been drawn, and has a likelihood
            unfed = len(self._masks) - len(self._thinking_states)
            last = self._pending[0] if self.soft and self._pending else self._empty_state()
            thinking_states = [*self._thinking_states, *[last] * unfed]
        stack = lambda steps: torch.stack(steps, dim=1).clone()  # noqa: E731
        return ThinkingTrace(
            thinking_mask=stack(self._masks),
            thinking_states=None if thinking_states is None else stack(thinking_states),
            hidden_states=stack(self._hidden_states) if "hidden_states" in self.keep else None,
            log_probs=stack(self._log_probs) if "log_probs" in self.keep else None,
            **{name: stack([kept[name] for kept in self._soft_kept]) for name in SOFT_KEPT if name in self.keep},
        )

    def _empty_state(self) -> torch.Tensor:
        weight = self.embedding.weight
        return weight.new_zeros(len(self._masks[0]), weight.shape[1])


class _SeeScores(LogitsProcessor):
    def __init__(self, session: HybridSession):
        self.session = session

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self.session.see_scores(scores)


class _SeeLogits(LogitsProcessor):
    def __init__(self, session: HybridSession):
        self.session = session

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.session.see_logits(scores)
        return scores


class _SeeingCriteria(StoppingCriteriaList):
    """The loop's own stopping criteria, which also pass their result to the session."""

    def __init__(self, criteria: StoppingCriteriaList, session: HybridSession):
        super().__init__(criteria)
        self.session = session

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        done = super().__call__(input_ids, scores, **kwargs)
        self.session.see_token(input_ids[:, -1], done)
        return done


def hybrid_decode(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    hybrid: HybridSession | None = None,
    **kwargs: Any,
) -> Any:
    """Decode with thinking states: the `custom_generate` callable for `model.generate`.

    Call it as `model.generate(..., custom_generate=hybrid_decode, hybrid=HybridSession(...))`.

    Args:
        model: a causal LM with thinking modules, wrapped by PEFT or not.
        input_ids (B, P): long, left-padded prompts.
        logits_processor: from `generate`.
        stopping_criteria: from `generate`.
        generation_config: from `generate`.
        hybrid: the session.
        **kwargs: from `generate`.

    Returns:
        What `generate` returns: ids (B, P + C) long, or a dictionary with them.

    Raises:
        ValueError: there is no session, or an argument does not work with thinking states
            (`unsloth_ext.common.generation_arguments`).
    """
    if hybrid is None:
        raise ValueError("custom_generate=hybrid_decode needs hybrid=HybridSession(...); or call hybrid_generate")
    check("hrpo", generation_config)
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH):
        raise ValueError(f"hybrid decoding is sampling or greedy; {mode.value} does not work with thinking states")
    if len(input_ids) > 1:
        check_batches(model)
    generation_config.disable_compile = True  # the hooks are Python
    hybrid.prepare(generation_config)
    from_logits = returning_hidden_states(model) if hybrid.needs_hidden else None
    if from_logits is not None and generation_config.output_logits:
        raise ValueError(
            "output_logits=True: under Unsloth the raw logits are replaced by hidden states; use output_scores"
        )
    first = [_SeeLogits(hybrid)] if hybrid.soft else []
    processors = LogitsProcessorList([*first, *logits_processor, _SeeScores(hybrid)])
    criteria = _SeeingCriteria(stopping_criteria, hybrid)
    handles = []
    # An ablation mixes rows, or draws noise for each
    if hybrid.ablation is None and can_drop_rows(model, generation_config, kwargs.get(CACHE)):
        handles += hybrid.live.attach(model)
    handles.append(hybrid.embedding.register_forward_hook(hybrid.fuse))
    if hybrid.needs_hidden and from_logits is None:
        handles.append(hybrid.lm_head.register_forward_pre_hook(hybrid.see_hidden))
    try:
        with without_decode_graphs():
            if from_logits is None:
                return _sample(model, input_ids, processors, criteria, generation_config, hybrid, **kwargs)
            with from_logits:  # Unsloth never calls its LM head, so it returns hidden states instead of logits
                processors.insert(0, from_logits.processor(hybrid))
                return _sample(model, input_ids, processors, criteria, generation_config, hybrid, **kwargs)
    finally:
        for handle in handles:
            handle.remove()


def _sample(model, input_ids, processors, criteria, generation_config, hybrid, **kwargs):
    from transformers.generation.utils import _get_torch_distributed_world_size
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
    from transformers.integrations.fsdp import is_fsdp_managed_module

    # `generate` drops these two for a callable `custom_generate`
    synced = hybrid.synced_gpus
    if synced is None:
        sharded = is_deepspeed_zero3_enabled() or (is_fsdp_managed_module(model) and not is_whole(model))
        synced = sharded and _get_torch_distributed_world_size() > 1
    return type(model)._sample(
        model, input_ids, processors, criteria, generation_config, synced, hybrid.streamer, **kwargs
    )


def hybrid_generate(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    matcher: DelimiterMatcher,
    *,
    keep: tuple[str, ...] = (),
    ablation: str | None = None,
    return_trace: bool = False,
    streamer: Any = None,
    **generate_kwargs: Any,
) -> Any:
    """Run `model.generate` with thinking states.

    Args:
        model: a causal LM with thinking modules, wrapped by PEFT or not.
        input_ids (B, P): long, left-padded. Pass `attention_mask` as for `generate`.
        matcher: finds the delimiter that ends the thinking.
        keep: the tensors of `ThinkingTrace` to record: `"thinking_states"`, `"hidden_states"`, `"log_probs"`.
        ablation: replaces the thinking states: `"zero"`, `"shuffle"` (another row's states), `"noise"` (of the same
            norm) or `"interpolate"` (halfway to another row's). `"off"` is plain `generate`.
        return_trace: also return the `ThinkingTrace`.
        streamer: as for `generate`.
        **generate_kwargs: as for `generate`. docs/generation.md lists what works.

    Returns:
        What `generate` returns, or this and the `ThinkingTrace` with `return_trace`.

    Raises:
        ValueError: an argument does not work with thinking states; or a prompt is empty or leaves no room for the
            answer.
    """
    if ablation == "off":
        if return_trace:
            raise ValueError("ablation='off' is plain generate and has no trace")
        return model.generate(input_ids=input_ids, streamer=streamer, **generate_kwargs)
    with samplers_count():
        config = settle(model, "hrpo", generate_kwargs)
    mask = generate_kwargs.get("attention_mask")
    lengths = (torch.ones_like(input_ids) if mask is None else mask).sum(1).tolist()
    refuse_empty(lengths)
    check_context(model, lengths, config)
    session = HybridSession(model, matcher, keep, ablation, streamer, generate_kwargs.pop("synced_gpus", None))
    tokenizer = generate_kwargs.pop("tokenizer", None)
    if config.stop_strings is not None:  # `generate` drops the tokenizer for a callable `custom_generate`
        if tokenizer is None:
            raise ValueError(f"stop_strings={config.stop_strings!r}: also pass tokenizer=tokenizer")
        criteria = [
            *(generate_kwargs.get("stopping_criteria") or []),
            StopStringCriteria(tokenizer, config.stop_strings),
        ]
        generate_kwargs |= {"stopping_criteria": StoppingCriteriaList(criteria), "stop_strings": None}
    with samplers_count():
        out = model.generate(
            input_ids=input_ids, streamer=streamer, custom_generate=hybrid_decode, hybrid=session, **generate_kwargs
        )
    return (out, session.trace()) if return_trace else out
