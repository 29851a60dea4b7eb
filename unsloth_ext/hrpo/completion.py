"""Completions of HRPO models, for `unsloth_ext.common.text_model`."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..common import completions
from ..common.completions import Completions, written
from ..common.delimiter import DelimiterMatcher
from ..common.evaluation_mode import evaluating
from ..common.generation_arguments import with_tokenizer
from .decoding import hybrid_generate


def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    *,
    state: str = "on",
    delimiter: str = "####",
    **generate_kwargs: Any,
) -> Completions:
    """Complete prompts with thinking states, or with `state="off"` without. See `completions.complete`."""
    if state == "off":
        return completions.complete(model, tokenizer, input_ids, attention_mask, **generate_kwargs)
    matcher = DelimiterMatcher(tokenizer, delimiter, model.config.get_text_config().vocab_size)
    with evaluating(model), torch.no_grad():
        out, trace = hybrid_generate(
            model,
            input_ids,
            matcher,
            ablation=None if state == "on" else state,
            return_trace=True,
            attention_mask=attention_mask,
            **with_tokenizer(tokenizer, generate_kwargs),
        )
    tokens = out[:, input_ids.shape[1] :]
    lengths = written(model, tokenizer, tokens, generate_kwargs)
    return Completions(tokens, lengths, lengths, trace.thinking_mask.sum(1).to(lengths.device))
