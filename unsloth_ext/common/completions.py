"""Completions of a batch of prompts, and what they cost, for models of any kind."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from .evaluation_mode import evaluating
from .generation_arguments import check_context, end_tokens, left_padded, refuse_empty, with_tokenizer
from .wrapping import causal_lm_of


@dataclass
class Completions:
    """What a model wrote after B prompts.

    Attributes:
        tokens (B, C): long, the new tokens; what follows a row's end is padding.
        lengths (B,): long, the number of new tokens of each row, with the token that ended it.
        forwards (B,): long, the forward passes that each row needed: one for each new token, and those of latent tokens or
            of a plan.
        latent (B,): long, how many steps of each row were taken in latent space: thinking tokens, latent tokens, or
            concepts of a plan.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    forwards: torch.Tensor
    latent: torch.Tensor


def lengths_of(tokens: torch.Tensor, ends: list[int], pad: int | None) -> torch.Tensor:
    """Count the tokens of each row up to its first end token, which counts.

    Args:
        tokens (B, C): long, new tokens.
        ends: ids that end a text.
        pad: id that fills rows which something else has ended, such as a stop string.

    Returns:
        (B,) long.
    """
    is_end = torch.isin(tokens, tokens.new_tensor(ends))
    over = (is_end.cumsum(1) - is_end.long()) > 0
    if pad is not None and pad not in ends:  # only at the end of a row, because a model may write this token too
        over |= (tokens != pad).flip(1).cumsum(1).flip(1) == 0
    return (~over).sum(1)


def written(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: torch.Tensor, generate_kwargs: dict[str, Any]
) -> torch.Tensor:
    """Count the tokens (B,) that `generate` wrote with these keywords. See `lengths_of`."""
    stopped = generate_kwargs.get("stop_strings") or generate_kwargs.get("stopping_criteria")
    return lengths_of(tokens, end_tokens(model, tokenizer), tokenizer.pad_token_id if stopped else None)


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
    """Complete prompts with `model.generate`: models without a method, and methods whose forward does all by itself.

    The methods' own functions (`completion` in their records) have the same arguments.

    Args:
        model: a causal LM, wrapped by PEFT or not.
        tokenizer: its tokenizer.
        input_ids (B, P): long, left-padded prompts.
        attention_mask (B, P): long.
        state: `"on"`, or an ablation among the `states` of the method's record.
        delimiter: the text that ends the thinking, for models that think until then.
        **generate_kwargs: as for `generate`.

    Raises:
        ValueError: a prompt is empty, or leaves no room for the answer.
    """
    prompts = attention_mask.sum(1).tolist()
    refuse_empty(prompts)
    fields = {name: value for name, value in generate_kwargs.items() if name != "stopping_criteria"}
    settings, _ = causal_lm_of(model)._prepare_generation_config(fields.pop("generation_config", None), **fields)
    check_context(model, prompts, settings)
    with evaluating(model), torch.no_grad():
        kwargs = with_tokenizer(tokenizer, generate_kwargs)
        out = model.generate(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    tokens = out[:, input_ids.shape[1] :]
    lengths = written(model, tokenizer, tokens, generate_kwargs)
    return Completions(tokens, lengths, lengths, torch.zeros_like(lengths))


def log_likelihood(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, contexts: list[list[int]], continuations: list[list[int]]
) -> list[tuple[float, bool]]:
    """Compute log p(continuation | context) by the model's own forward.

    The methods' own functions (`likelihood` in their records) have the same arguments.

    Args:
        model: a causal LM, wrapped by PEFT or not.
        tokenizer: its tokenizer.
        contexts: token ids, at least one each.
        continuations: token ids, at least one each.

    Returns:
        For each pair the log-probability in nats, and whether greedy decoding would write the continuation.
    """
    ids = left_padded(tokenizer, [[*context, *text] for context, text in zip(contexts, continuations, strict=True)])
    ids, mask = (ids[name].to(model.device) for name in ("input_ids", "attention_mask"))
    with evaluating(model), torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        longest = max(map(len, continuations))
        logits = model(ids, attention_mask=mask, position_ids=positions, logits_to_keep=longest + 1).logits[:, :-1]
    return scored(logits, ids[:, -longest:], torch.tensor([len(text) for text in continuations], device=ids.device))


def scored(
    logits: torch.Tensor, tokens: torch.Tensor, lengths: torch.Tensor, right: bool = True
) -> list[tuple[float, bool]]:
    """Sum the log-probabilities of each row's last tokens, or with `right=False` of its first.

    Args:
        logits (B, T, V): of `tokens`.
        tokens (B, T): long.
        lengths (B,): long, how many of a row's tokens count.
        right: whether rows end together, and not begin.
    """
    places = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    counted = places >= tokens.shape[1] - lengths[:, None] if right else places < lengths[:, None]
    log_probs = logits.float().log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    sums = log_probs.masked_fill(~counted, 0).sum(1)
    greedy = ((logits.argmax(-1) == tokens) | ~counted).all(1)
    return list(zip(sums.tolist(), greedy.tolist(), strict=True))
