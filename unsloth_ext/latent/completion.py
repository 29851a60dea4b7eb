"""Completions of models with latent tokens, for `unsloth_ext.common.text_model`."""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..common import completions
from ..common.ablations import ABLATIONS
from ..common.compat import CACHE
from ..common.completions import Completions, scored, written
from ..common.evaluation_mode import evaluating
from ..common.generation_arguments import left_padded, with_tokenizer
from ..common.wrapping import backbone_of
from .model import latent_generate
from .phase import latent_phase


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
    """Answer questions after latent tokens, or with `state="off"` without. See `completions.complete`."""
    if state == "off":
        return completions.complete(model, tokenizer, input_ids, attention_mask, **generate_kwargs)
    out, thought = latent_generate(
        model,
        input_ids,
        attention_mask,
        intervene=ABLATIONS.get(state),
        return_state=True,
        **with_tokenizer(tokenizer, generate_kwargs),
    )
    number = backbone_of(model).latent_config.num_latents
    tokens = out[:, input_ids.shape[1] + number + 2 :]
    lengths = written(model, tokenizer, tokens, generate_kwargs)
    return Completions(tokens, lengths, lengths + thought.num_forwards, torch.full_like(lengths, number))


def log_likelihood(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, contexts: list[list[int]], continuations: list[list[int]]
) -> list[tuple[float, bool]]:
    """Compute log p(answer | question, latent tokens), which is exact: latent tokens are a function of the question."""
    batch = {name: x.to(model.device) for name, x in left_padded(tokenizer, contexts).items()}
    with evaluating(model), torch.no_grad():
        state = latent_phase(model, batch["input_ids"], batch["attention_mask"])
        lengths = torch.tensor([len(text) for text in continuations], device=model.device)
        eot = backbone_of(model).latent_token_ids[2]
        longest = int(lengths.max())
        rows = [[eot, *text] + [eot] * (longest - len(text)) for text in continuations]
        ids = torch.tensor(rows, device=model.device)
        mask = torch.cat([state.attention_mask, state.attention_mask.new_ones(ids.shape)], dim=1)
        positions = (mask.cumsum(1) - 1)[:, -ids.shape[1] :]
        out = model(ids, attention_mask=mask, position_ids=positions, **{CACHE: state.cache})
    return scored(out.logits[:, :-1], ids[:, 1:], lengths, right=False)
