"""Arguments of transformers' `generate`: which work with each method, and which are refused by name.

| method    | called by                                     |
|-----------|-----------------------------------------------|
| `hrpo`    | `hybrid_generate`, `hybrid_decode`            |
| `latent`  | `latent_generate`, `LatentModel.generate`     |
| `concept` | `ConceptModel.generate`                       |
| `planner` | `execute_plan`, `PlannerExecutorModel`        |

Arguments that work are handled by `generate` itself. The table in docs/generation.md is `table()`. An argument counts
wherever it is set: in the call, in a `generation_config`, or in the model's own.
"""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .log_filter import showing_only
from .method import attaching_methods
from .wrapping import causal_lm_of


CHECKS = logging.getLogger("transformers.generation.configuration_utils")


class Refusal(NamedTuple):
    """Values of an argument other than `free` are refused, by all methods or by those whose record names it."""

    by_all: bool
    why: str
    free: tuple = (None,)

    def concerns(self, name: str, method: str) -> bool:
        """Return whether an argument is refused for models of a method."""
        return self.by_all or name in attaching_methods()[method].refused_arguments


_ASSISTED = "rejected draft tokens cannot be removed from the model's state; sample, or decode greedily"
_BEAMS = "each sequence has a state of its own, and beams are reordered; sample, or decode greedily"
_SEARCH = "transformers keeps this search method outside its library; sample, or decode greedily"
_CACHE = "the model makes its own cache; leave it out"
_PROMPT = "the model makes its own prompt; leave it out"
_GUIDANCE = "the unguided pass would have no state of its own; leave it out"

_EVERYWHERE = """
    max_length max_new_tokens min_length min_new_tokens max_time stop_strings
    do_sample temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff renormalize_logits
    num_return_sequences early_stopping length_penalty
    repetition_penalty no_repeat_ngram_size bad_words_ids sequence_bias exponential_decay_length_penalty
    suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id remove_invalid_values watermarking_config
    output_scores output_logits return_dict_in_generate
    pad_token_id bos_token_id eos_token_id disable_compile compile_config
"""
WORKS = frozenset(_EVERYWHERE.split())
# They belong to refused features or to encoder-decoders, so `generate` does not read them here
_NOWHERE = """
    num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold assistant_lookbehind target_lookbehind
    assistant_ensemble_weight max_matching_ngram_size speculation_type decoder_start_token_id max_cache_len
    continuous_batching_config diversity_penalty is_assistant low_memory transformers_version
"""
WITHOUT_EFFECT = frozenset(_NOWHERE.split())
REFUSED = {
    "num_beams": Refusal(False, _BEAMS, (None, 1)),
    "num_beam_groups": Refusal(True, _SEARCH, (None, 1)),
    "constraints": Refusal(True, _SEARCH),
    "force_words_ids": Refusal(True, _SEARCH),
    "penalty_alpha": Refusal(True, _SEARCH, (None, 0, 0.0)),
    "dola_layers": Refusal(True, _SEARCH),
    "prompt_lookup_num_tokens": Refusal(True, _ASSISTED),
    "assistant_early_exit": Refusal(True, _ASSISTED),
    "use_mtp": Refusal(True, _ASSISTED, (None, False)),
    "use_cache": Refusal(False, "the plan is read once and kept in the cache; leave it out", (None, True)),
    "cache_implementation": Refusal(False, _CACHE, (None, "dynamic", "hybrid")),
    "cache_config": Refusal(True, "quantised caches are not tested; leave it out"),
    "prefill_chunk_size": Refusal(False, "the prompt is read in one piece; leave it out"),
    "guidance_scale": Refusal(True, _GUIDANCE, (None, 1, 1.0)),
    "token_healing": Refusal(True, "it would change the prompt after it was read; leave it out", (None, False)),
    "output_attentions": Refusal(False, "the layers process slots, not tokens; leave it out", (None, False)),
    "output_hidden_states": Refusal(False, "the layers process slots, not tokens; leave it out", (None, False)),
    "encoder_repetition_penalty": Refusal(False, "the executor has no input text; leave it out", (None, 1, 1.0)),
    "encoder_no_repeat_ngram_size": Refusal(False, "the executor has no input text; leave it out", (None, 0)),
}
# Parameters of `generate` and of the model's forward that are not in the generation config
_BESIDE = "generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn synced_gpus streamer tokenizer"
PARAMETERS_THAT_WORK = frozenset(_BESIDE.split())
REFUSED_PARAMETERS = {
    "inputs": Refusal(True, "pass the prompt under the name that this function gives it"),
    "assistant_model": Refusal(True, _ASSISTED),
    "assistant_tokenizer": Refusal(True, _ASSISTED),
    "negative_prompt_ids": Refusal(True, _GUIDANCE),
    "negative_prompt_attention_mask": Refusal(True, _GUIDANCE),
    "custom_generate": Refusal(True, "another decoding loop does not use this model's state; leave it out"),
    "trust_remote_code": Refusal(True, "no code is downloaded; leave it out", (None, False)),
    "input_ids": Refusal(False, _PROMPT),
    "attention_mask": Refusal(False, _PROMPT),
    "inputs_embeds": Refusal(False, _PROMPT),
    "position_ids": Refusal(False, _PROMPT),
    "past_key_values": Refusal(False, _CACHE),
    "cache": Refusal(False, _CACHE),
}


def settle(model: nn.Module, method: str, arguments: dict[str, Any]) -> GenerationConfig:
    """Build the generation config that `generate` would use and check it for the method.

    Args:
        model: the causal LM, wrapped by PEFT or not.
        method: the name of the method.
        arguments: keywords as for `generate`.

    Returns:
        The complete generation config.

    Raises:
        ValueError: an argument does not work with the method, or transformers refuses it.
    """
    if arguments.get("engine") is not None:  # `latent_generate` keeps its own
        why = attaching_methods()[method].without_vllm
        raise ValueError(f"engine={arguments['engine']!r}: {why}; leave it out ({method} models, docs/vllm.md)")
    for name, value in arguments.items():
        refusal = REFUSED_PARAMETERS.get(name)
        if refusal is not None and refusal.concerns(name, method) and not _free(value, refusal):
            raise ValueError(f"{name}: {refusal.why} ({method} models, docs/generation.md)")
    if arguments.get("cache_implementation") == "paged":  # `generate` would hand over to continuous batching
        raise ValueError("cache_implementation='paged': continuous batching does not keep this model's state")
    causal_lm = causal_lm_of(model)
    if model.generation_config is not causal_lm.generation_config:
        causal_lm.generation_config = model.generation_config  # as PEFT's `generate` does
    fields = {name: value for name, value in arguments.items() if hasattr(GenerationConfig(), name)}
    config, _ = causal_lm._prepare_generation_config(arguments.get("generation_config"), **fields)
    check(method, config)
    return config


def samplers_count() -> AbstractContextManager[None]:
    """Hide transformers' warning that sampling settings "may be ignored" in greedy decoding.

    Soft embeddings, which are thinking states, are made with `top_k` and the like, so the warning would be wrong. No
    setting of transformers 5.17 turns it off.
    """
    untrue = "The following generation flags are not valid and may be ignored"
    return showing_only(CHECKS, lambda record: not record.getMessage().startswith(untrue))


def check(method: str, config: GenerationConfig) -> None:
    """Raise a ValueError if a complete generation config has a field that does not work with the method."""
    for name, refusal in REFUSED.items():
        value = getattr(config, name, None)
        if refusal.concerns(name, method) and not _free(value, refusal):
            raise ValueError(f"{name}={value!r}: {refusal.why} ({method} models, docs/generation.md)")


def _free(value: Any, refusal: Refusal) -> bool:
    return any(value is free or (isinstance(value, (int, float, str)) and value == free) for free in refusal.free)


def check_context(model: nn.Module, lengths: Sequence[int], config: GenerationConfig, around: int = 0) -> None:
    """Check that prompts and answers fit into the positions that the model was made for.

    Args:
        model: the causal LM.
        lengths: the number of real tokens of each prompt.
        config: says how many new tokens there may be.
        around: positions that are used for something other than prompt and answer.

    Raises:
        ValueError: a prompt with its answer is too long. The message names the longest prompt.
    """
    context = context_of(model)
    if context is None or not lengths:
        return
    row = max(range(len(lengths)), key=lengths.__getitem__)
    room = context - around - lengths[row]
    new = config.max_new_tokens
    if new is None:  # `max_length` counts the prompt; if it is within the model's context, one new token must fit
        new = config.max_length - lengths[row] if (config.max_length or 0) > context else 1
    if new > room:
        needed = f"{lengths[row]} tokens" + (f", {around} positions of the model's own" if around else "")
        why = ", beyond which its RoPE changes and cached keys no longer fit" if _changing(model) else ""
        raise ValueError(
            f"prompt {row} has {needed} and up to {new} new tokens: more than the model's {context} positions{why}. "
            "Shorten the prompt or lower max_new_tokens or max_length"
        )


def context_of(model: nn.Module) -> int | None:
    """Return the number of positions that a model was made for, or None if its config sets no limit.

    Some RoPEs depend on the length of the text. For these the limit is the length up to which the RoPE stays the same.
    Beyond it transformers 5.17 reads the whole text again (Phi-3) or mixes two kinds of keys, and a batch gives other
    results than its rows.
    """
    positions: Any = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    changing = _changing(model)
    if changing:  # longrope has a field of its own, which its config always fills; dynamic changes beyond the positions
        return min(
            part["original_max_position_embeddings"] if part["rope_type"] == "longrope" else positions
            for part in changing
        )
    factor = max([part.get("factor") or 1 for part in _ropes(model)], default=1)
    # Some configs are multiplied already, which only raises the limit
    return None if positions is None else int(positions * factor)


def _ropes(model: nn.Module) -> list[dict[str, Any]]:
    """Return the RoPE parameters of a config: one set, or one for each kind of layer."""
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return [part for part in (rope, *rope.values()) if isinstance(part, dict)]


def _changing(model: nn.Module) -> list[dict[str, Any]]:
    """Return the RoPE parameters that depend on the length of the text."""
    return [part for part in _ropes(model) if part.get("rope_type") in ("dynamic", "longrope")]


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids that end an answer: those of the model's generation config, else the tokenizer's, else none."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        ends = tokenizer.eos_token_id
    return [] if ends is None else list(ends) if isinstance(ends, (list, tuple)) else [ends]


def refuse_empty(lengths: Sequence[int]) -> None:
    """Raise a ValueError if a prompt has no tokens."""
    if 0 in lengths:
        raise ValueError(f"prompt {lengths.index(0)} is empty; remove it or write something")


def left_padded(tokenizer: PreTrainedTokenizerBase, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Pad prompts on the left. The tokenizer need not have a padding token.

    Args:
        tokenizer: gives the padding token.
        rows: the token ids of each prompt.

    Returns:
        `input_ids` and `attention_mask`, both (B, T) long.
    """
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[pad] * (width - len(row)) + row for row in rows], dtype=torch.long),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], dtype=torch.long),
    }


def with_tokenizer(tokenizer: PreTrainedTokenizerBase, arguments: dict[str, Any]) -> dict[str, Any]:
    """Complete the arguments of `generate` with the tokenizer's padding token and, for stop strings, the tokenizer
    itself.

    Args:
        tokenizer: the tokenizer of the model.
        arguments: keywords for `generate`. They take precedence.

    Returns:
        The completed keywords.
    """
    given = arguments.get("generation_config")
    added = {}
    if tokenizer.pad_token_id is not None and getattr(given, "pad_token_id", None) is None:
        added["pad_token_id"] = tokenizer.pad_token_id
    if arguments.get("stop_strings", getattr(given, "stop_strings", None)):
        added["tokenizer"] = tokenizer
    return {**added, **arguments}


def grouped(texts: list[str], prompts: int) -> list:
    """Return one text for each prompt, or a list of texts for each if `num_return_sequences` > 1."""
    copies = len(texts) // prompts
    return texts if copies == 1 else [texts[i : i + copies] for i in range(0, len(texts), copies)]


def table() -> str:
    """Return the table of docs/generation.md."""
    cells = {True: "works", False: "refused"}
    refused: dict[str, Refusal] = {**REFUSED, **REFUSED_PARAMETERS}
    methods = list(attaching_methods())
    lines = ["| argument | " + " | ".join(methods) + " | refused because |", "|---|" + "---|" * (len(methods) + 1)]
    for name in sorted({*WORKS, *WITHOUT_EFFECT, *PARAMETERS_THAT_WORK, *refused}):
        if name in WITHOUT_EFFECT:
            row, why = ["no effect"] * len(methods), ""
        else:
            refusal = refused.get(name)
            row = [cells[refusal is None or not refusal.concerns(name, method)] for method in methods]
            why = refusal.why if refusal else ""
        lines.append(f"| `{name}` | " + " | ".join(row) + f" | {why} |")
    return "\n".join(lines) + "\n"
