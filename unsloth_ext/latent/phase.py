"""The latent phase between question and answer (CODI, arXiv 2502.21074; PCCoT, arXiv 2506.18582).

Sequential (CODI, Coconut): z_1 = prj(h at <bot>), z_{j+1} = prj(h at z_j), M passes of one token.

Jacobi (PCCoT): one pass over question, <bot> and M times <latent>; z = prj(h at <bot> .. <latent>_{M-1}); then T passes
over z on the question's cached keys and values, z = [z_1, prj(h)[:-1]]. The answer reads the cache of pass T.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import DynamicCache

from ..common.compat import CACHE, CHECKPOINTING, is_checkpointing
from ..common.embeddings import embedding_norm
from ..common.evaluation_mode import evaluating
from ..common.model_probe import same_states, trial_ids
from ..common.wrapping import backbone_of, causal_lm_of


Intervention = Callable[[torch.Tensor], torch.Tensor]
PADS, TRIAL = 2, 4  # of the trial text: the pads before it, and its tokens in the cache and after it


@dataclass(frozen=True)
class LatentState:
    """The result of a latent phase, from which the answer is decoded. Q is the length of the questions without <bot>.

    Attributes:
        cache: keys and values of question, <bot> and latent tokens, of length Q + 1 + M.
        attention_mask (B, Q + 1 + M): long.
        latents (B, M, d): in the model's dtype, the inputs of the last pass.
        hidden_states (B, M, d): in the model's dtype, the last hidden states of that pass at the latent tokens.
        before (P, B, M, d): in the model's dtype, the last hidden states one position before each latent token, of <bot>
            for the first: those that predict what the token stands for. Of all passes in order: P = T + 1 in Jacobi
            iterations (the first reads question and <latent>), else 1.
        num_forwards: the number of passes so far.
    """

    cache: DynamicCache
    attention_mask: torch.Tensor
    latents: torch.Tensor
    hidden_states: torch.Tensor
    before: torch.Tensor
    num_forwards: int

    def latent_kv(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return the keys and values (B, Hkv, M, D) of the latent tokens for each layer."""
        count = self.latents.shape[1]
        return [(layer.keys[:, :, -count:], layer.values[:, :, -count:]) for layer in self.cache.layers]


def prefill(model: nn.Module, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> DynamicCache:
    """Compute the keys and values of left-padded tokens (B, P), to continue from them. See `branch`."""
    backbone = backbone_of(model)
    cache = DynamicCache(config=backbone.config)
    positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
    backbone(
        input_ids=input_ids,
        attention_mask=attention_mask,
        position_ids=positions,
        use_cache=True,
        **{CACHE: cache},
    )
    return cache


@torch.no_grad()
def check_backbone(model: nn.Module) -> None:
    """Check that a decoder continues from left-padded tokens in a cache, given embeddings, as it does without a cache.

    The check is skipped if weights are sharded or not in memory.

    Raises:
        ValueError: it does not.
    """
    backbone = backbone_of(model)
    embedding = backbone.get_input_embeddings()
    if embedding.weight.is_meta or not embedding.weight.numel():
        return
    ids = trial_ids(model, PADS + 2 * TRIAL)
    mask = torch.ones_like(ids)
    mask[:, :PADS] = 0
    first = PADS + TRIAL
    with evaluating(model):
        plain = backbone(inputs_embeds=embedding(ids[:, PADS:]), use_cache=False).last_hidden_state[:, TRIAL:]
        cache = prefill(model, ids[:, :first], mask[:, :first])
        found = cache.get_seq_length() == first
        if found:
            embeds = embedding(ids[:, first:])
            hidden = backbone(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1)[:, first:],
                use_cache=True,
                **{CACHE: cache},
            ).last_hidden_state
            kept = torch.equal(embeds, embedding(ids[:, first:]))  # CTRL scales its input in place
            found = kept and hidden.shape == embeds.shape and same_states(hidden, plain)
    if not found:
        raise ValueError(
            f"{type(causal_lm_of(model)).__name__} cannot think in latent tokens: with a padded question in its cache it "
            "does not read embeddings as in one text; take a model such as llama or qwen3"
        )


def branch(cache: DynamicCache) -> DynamicCache:
    """Return a cache that grows independently from what `cache` holds now. No tensor is copied."""
    other = copy.copy(cache)
    other.layers = [copy.copy(layer) for layer in cache.layers]
    return other


def latent_phase(
    model: nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    intervene: Intervention | None = None,
    attend_pads: bool = False,
    past_key_values: DynamicCache | None = None,
) -> LatentState:
    """Run the latent phase of questions, with gradients through every pass if they are enabled.

    Args:
        model: a causal LM with latent tokens (`attach_latent`), wrapped by PEFT or not.
        input_ids (B, Q): long, left-padded questions without <bot>.
        attention_mask (B, Q): long.
        intervene: an ablation, applied to the latent inputs (B, M, d) or (B, 1, d) before each pass.
        attend_pads: let latent tokens attend to left pads, as the official code of PCCoT and CODI does. Results then
            depend on the batch. Use it only to reproduce its numbers.
        past_key_values: a cache of the first tokens of the questions, fewer than Q (see `prefill`). It grows in place.

    Returns:
        The state after the last latent token.

    Raises:
        ValueError: gradient checkpointing is on, with which transformers drops the cache and so the question.
    """
    backbone = backbone_of(model)
    config, (bot, latent, _) = backbone.latent_config, backbone.latent_token_ids
    if backbone.training and is_checkpointing(backbone):
        raise ValueError(
            "gradient checkpointing is on: transformers then drops the cache in training, and the latent tokens would not "
            f"see the question. Call model.{CHECKPOINTING}_disable()"
        )
    intervene = intervene or (lambda z: z)
    count = config.num_latents
    rows = len(input_ids)
    ids = torch.cat([input_ids, input_ids.new_full((rows, 1), bot)], dim=1)
    mask = torch.cat([attention_mask, attention_mask.new_ones(rows, 1 + count)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    question = ids.shape[1]
    cache = DynamicCache(config=backbone.config) if past_key_values is None else past_key_values
    done = cache.get_seq_length()
    ids = ids[:, done:]

    def forward(until: int, **inputs: torch.Tensor) -> torch.Tensor:
        length = next(iter(inputs.values())).shape[1]
        seen = torch.ones_like(mask) if attend_pads and length < until else mask
        return backbone(
            **inputs,
            attention_mask=seen[:, :until],
            position_ids=positions[:, until - length : until],
            use_cache=True,
            **{CACHE: cache},
        ).last_hidden_state

    if config.iterations is None:
        hidden, inputs, outputs = forward(question, input_ids=ids), [], []
        at_bot = hidden[:, -1:]
        for j in range(count):
            inputs.append(intervene(project_latent(backbone, hidden[:, -1:])))
            hidden = forward(question + j + 1, inputs_embeds=inputs[-1])
            outputs.append(hidden)
        before = torch.cat([at_bot, *outputs[:-1]], dim=1)[None]
        return LatentState(cache, mask, torch.cat(inputs, dim=1), torch.cat(outputs, dim=1), before, 1 + count)

    embeds = backbone.get_input_embeddings()(ids.new_full((rows, count), latent))
    if config.iterations == 0:
        embeds = intervene(embeds)
        prompt = backbone.get_input_embeddings()(ids)
        hidden = forward(question + count, inputs_embeds=torch.cat([prompt, embeds], dim=1))
        return LatentState(cache, mask, embeds, hidden[:, -count:], hidden[None, :, -count - 1 : -1], 1)
    ids = torch.cat([ids, ids.new_full((rows, count), latent)], dim=1)
    cache.activate_past_recording()  # otherwise a layer with a window forgets what `crop` returns to
    hidden = forward(question + count, input_ids=ids)
    shift = 1 if config.update == "shifted" else 0
    first = question - done - shift
    outputs = project_latent(backbone, hidden[:, first : first + count])
    at_bot, before = hidden[:, -count - 1 : -count], [hidden[:, -count - 1 : -1]]
    z = intervene(outputs + embeds if config.feedback_residual else outputs)
    for t in range(config.iterations):
        cache.crop(-count)  # back to the question
        hidden = forward(question + count, inputs_embeds=z)
        before.append(torch.cat([at_bot, hidden[:, :-1]], dim=1))
        if t == config.iterations - 1:
            break
        outputs = project_latent(backbone, hidden)[:, : count - shift]
        if config.feedback_residual:
            outputs = outputs + (embeds if config.feedback_onto == "embedding" else z)[:, shift:]
        z = intervene(torch.cat([z[:, :shift], outputs], dim=1))
    cache.crop(0)  # drop what was recorded beyond the window
    for layer in cache.layers:
        if getattr(layer, "record_past", False):
            layer.record_past = False  # the answer is decoded as after any prompt
    return LatentState(cache, mask, z, hidden, torch.stack(before), 1 + config.iterations)


def norm_ratio(model: nn.Module, state: LatentState) -> torch.Tensor:
    """Return the mean norm of the latent inputs over that of the model's embeddings: a float32 scalar, no gradient."""
    return state.latents.detach().float().norm(dim=-1).mean() / embedding_norm(backbone_of(model))


def project_latent(backbone: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """Return the next latent input (..., d) for a hidden state (..., d), in the same dtype."""
    projection = getattr(backbone, "latent_projection", None)
    return hidden if projection is None else projection(hidden).to(hidden.dtype)
