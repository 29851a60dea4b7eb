"""What one backbone needs to be planner and executor: new rows, read as inputs and, tied, as outputs.

    input    row + type_embedding[type]                       type 0: text, <BOS>, <PLAN> and their like; i: SEP_i, V_i
    output   hidden @ table[V_i, EOS_i]^T in a concept state of type i; the LM head's logits in a text state

Rotary positions are the model's own.
"""

from typing import Any

import torch
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel

from ..common.attaching import check_attachable, remember, with_modules
from ..common.attention_tap import NAME as TAPPED
from ..common.embeddings import embedding_rms
from ..common.evaluation_mode import evaluating
from ..common.layer_kinds import check_layers
from ..common.master_weights import MasterWeights, beside, without_autocast
from ..common.model_probe import same_states, trial_ids
from ..common.unsloth_decoding import on_unsloth
from ..common.wrapping import backbone_of
from .config import PlannerConfig
from .method import METHOD
from .slot_sequence import SlotSequence
from .vocabulary import BOS, PlannerVocabulary


(HEAD,) = METHOD.modules
# Standard deviation of the first logits. Gumbel noise has 1.3: below that, plans are noise to begin with, and the executor
# learns to write without them before the planner can make them mean anything (docs/log.md)
FIRST_LOGITS = 3.0


class SharedBackboneUnifiedHead(MasterWeights):
    """The table of new rows, tied as inputs and outputs, and the embeddings of types.

    Attributes:
        table: (rows, d), see `PlannerVocabulary`.
        type_embedding: (n + 1, d), 0 at first; the first is of text.
    """

    def __init__(self, d: int, config: PlannerConfig, std: float, **like):
        super().__init__()
        self.vocabulary = PlannerVocabulary(config)
        self.table = nn.Parameter(torch.empty(self.vocabulary.size, d, **like).normal_(std=std))
        self.type_embedding = nn.Parameter(torch.zeros(len(config.types) + 1, d, **like))

    def forward(self, hidden: torch.Tensor, i: int) -> torch.Tensor:
        """Logits (..., V_i + 1) of final-norm hidden states (..., d) in a concept state of type `i`, in fp32 or wider."""
        with without_autocast(hidden.device):
            return hidden.to(self.table.dtype) @ self.table[self.vocabulary.outputs(i)].T

    def special(self, row: int) -> torch.Tensor:
        """(d,), as read: <BOS>, <PLAN>, <NULL>, <DROPPED>."""
        return self.table[row] + self.type_embedding[0]

    def sep(self, i: int) -> torch.Tensor:
        """(d,), as read."""
        return self.typed(self.table[self.vocabulary.sep(i)], i)

    def queries(self, i: int) -> torch.Tensor:
        """(quota, d), as read."""
        return self.typed(self.table[self.vocabulary.queries(i)], i)

    def concepts(self, i: int) -> torch.Tensor:
        """(V_i, d), without the type."""
        return self.table[self.vocabulary.concepts(i)]

    def typed(self, embeds: torch.Tensor, i: int) -> torch.Tensor:
        """Embeddings (..., d) of type `i`, as read."""
        return embeds + self.type_embedding[i + 1]


def text_embeds(backbone: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Tokens (...) as read (..., d)."""
    embeds = backbone.get_input_embeddings()(input_ids)
    return embeds + backbone.unified_head.type_embedding[0].to(embeds.dtype)


def concept_embeds(backbone: nn.Module, plan: torch.Tensor) -> torch.Tensor:
    """Codewords (B, n, Q, d) of plans (B, n, Q), without types; any where there is none."""
    head = backbone.unified_head
    starts = [head.vocabulary.concepts(i).start for i in range(plan.shape[1])]
    return nn.functional.embedding(plan.clamp(min=0) + plan.new_tensor(starts)[:, None], head.table)


def attach_planner(model: PreTrainedModel, config: PlannerConfig | None = None) -> PreTrainedModel:
    """Give a causal LM its `SharedBackboneUnifiedHead`, in place. Attach before PEFT wraps the model.

    New rows are as large as token embeddings, with their root mean square, and concepts large enough for logits that noise
    does not drown; <BOS> is the model's own where it has one. Draws from the global RNG. Nothing is frozen here.

    Raises:
        ValueError: the model plans already, is wrapped by PEFT, runs Unsloth's fast forwards, or its attention is not SDPA
            or eager over the whole text.
    """
    config = config or PlannerConfig()
    if isinstance(model, PeftModel):
        raise ValueError("the model is wrapped by PEFT already: attach the planner first, see with_planner_modules")
    if on_unsloth(model):
        raise ValueError(
            "the model runs Unsloth's fast forwards, which take no masks of ours: load it with AutoModelForCausalLM"
        )
    backbone = check_attachable(model, METHOD)
    attention = backbone.config._attn_implementation
    if attention not in ("sdpa", "eager", TAPPED):
        raise ValueError(f"attn_implementation={attention!r}: planning needs 'sdpa' or 'eager'")
    check_layers(model, "a plan")
    scale = check_backbone(model)
    weight = model.get_input_embeddings().weight
    std = embedding_rms(model.get_input_embeddings())
    head = SharedBackboneUnifiedHead(weight.shape[1], config, std, **beside(weight))
    sharp = FIRST_LOGITS / (weight.shape[1] ** 0.5 * scale)
    for i in range(len(config.types)):
        head.table.data[head.vocabulary.outputs(i)] *= max(1.0, sharp / std)
    bos = model.config.get_text_config().bos_token_id
    if bos is not None:
        with torch.no_grad():
            head.table[BOS] = model.get_input_embeddings()(torch.tensor(bos, device=weight.device))
    setattr(backbone, HEAD, head)
    model.generation_config.use_cache = True  # which a config saved in training may deny; a plan lives in the cache
    remember(model, METHOD, config)
    return model


@torch.no_grad()
def check_backbone(model: nn.Module) -> float:
    """Raises a ValueError if the decoder does not take the masks and positions that plans are read with: slots that are
    hidden must not matter.

    Returns:
        The root mean square of its last states, which the final norm decides: by its weight w, by 1 + w, or otherwise.
    """
    backbone = backbone_of(model)
    embeds = backbone.get_input_embeddings()(trial_ids(model, 12))
    times = torch.arange(8, device=embeds.device)[None]
    lacks = f"{type(model).__name__} cannot plan: it does not take the masks and positions that a plan is read with"
    with evaluating(model):
        try:
            plain = backbone(
                inputs_embeds=embeds[:, :8], attention_mask=torch.ones_like(times), position_ids=times, use_cache=False
            ).last_hidden_state
            slots = SlotSequence(backbone, 1, embeds.device)
            slots.add(embeds[:, :4], times[:, :4])
            slots.add(embeds[:, 8:], times[:, 3:7], branch=0)
            slots.read()
            slots.add(embeds[:, 4:8], times[:, 4:])
            hidden = slots.read()
        except (TypeError, AttributeError, ValueError, KeyError) as error:
            raise ValueError(f"{lacks} ({error}); take a model such as llama or qwen3") from error
    if not same_states(hidden, plain[:, 4:]):
        raise ValueError(f"{lacks}; take a model such as llama or qwen3")
    return plain.float().square().mean().sqrt().item()


def with_planner_modules(config: PeftConfig) -> dict[str, Any]:
    """The fields of a PEFT config that make it train and save the head. LoRA leaves it alone: it has no linear layer.

    Raises:
        ValueError: the PEFT method has no `modules_to_save`.
    """
    return with_modules(config, METHOD)
