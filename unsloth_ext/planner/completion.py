"""Completions of models that plan, for `unsloth_ext.common.text_model`."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..common.completions import Completions, scored, written
from ..common.evaluation_mode import evaluating
from ..common.generation_arguments import left_padded, refuse_empty, with_tokenizer
from ..common.logits import logits_of
from ..common.wrapping import unwrapped
from .executor import executor_forward, executor_prefix
from .model import execute_plan
from .planning import plan
from .vocabulary import plan_lengths


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
    """Plan greedily, then write from the plans alone. See `completions.complete`.

    With `state="shuffle"` each text is written from the plan of another row of the batch. A concept counts as one forward
    pass, also where a model predicts several in one.
    """
    refuse_empty(attention_mask.sum(1).tolist())
    plans = plan(model, input_ids, attention_mask)
    used = plans.roll(1, dims=0) if state == "shuffle" else plans
    tokens = execute_plan(model, used, **with_tokenizer(tokenizer, generate_kwargs))
    lengths = written(model, tokenizer, tokens, generate_kwargs)
    concepts = plan_lengths(plans).sum(1)
    return Completions(tokens, lengths, lengths + concepts, concepts)


def log_likelihood(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, contexts: list[list[int]], continuations: list[list[int]]
) -> list[tuple[float, bool]]:
    """Compute log p(text | z) with the plan z that the planner takes greedily, from which `complete` writes too.

    This is not log p(text | prompt), which would be a sum over all plans.
    """
    batch = {name: x.to(model.device) for name, x in left_padded(tokenizer, contexts).items()}
    lengths = torch.tensor([len(text) for text in continuations], device=model.device)
    longest = int(lengths.max())
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in continuations], device=model.device)
    mask = torch.arange(longest, device=model.device) < lengths[:, None]
    with evaluating(model), torch.no_grad():
        prefix = executor_prefix(model, plan(model, **batch))
        logits = logits_of(unwrapped(model), executor_forward(model, prefix, ids, mask.long()))
    return scored(logits, ids, lengths, right=False)
