"""The planner's head: new rows that are tied as inputs and outputs, and embeddings of types (ours).

    input    row + type_embedding[type]                       type 0: text, <BOS>, <PLAN> and the like; i: SEP_i, V_i
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
# Standard deviation of the first logits. That of Gumbel noise is 1.3. With less, plans begin as noise, and the executor
# learns to write without them before the planner can give them a meaning (docs/log.md)
FIRST_LOGITS = 3.0


class SharedBackboneUnifiedHead(MasterWeights):
    """The table of new rows, tied as inputs and outputs, and the embeddings of types.

    Args:
        d: the width of the model.
        config: the planner's settings.
        std: the standard deviation of the initial rows.
        **like: device and dtype.

    Attributes:
        table (rows, d): float32 or wider, see `PlannerVocabulary`.
        type_embedding (n + 1, d): float32 or wider, 0 at first. The first row is for text.
    """

    def __init__(self, d: int, config: PlannerConfig, std: float, **like):
        super().__init__()
        self.vocabulary = PlannerVocabulary(config)
        self.table = nn.Parameter(torch.empty(self.vocabulary.size, d, **like).normal_(std=std))
        self.type_embedding = nn.Parameter(torch.zeros(len(config.types) + 1, d, **like))

    def forward(self, hidden: torch.Tensor, i: int) -> torch.Tensor:
        """Compute the logits of the concepts of a type.

        Args:
            hidden (..., d): floating point, hidden states after the final norm.
            i: the type.

        Returns:
            (..., V_i + 1) in fp32 or wider.
        """
        with without_autocast(hidden.device):
            return hidden.to(self.table.dtype) @ self.table[self.vocabulary.outputs(i)].T

    def special(self, row: int) -> torch.Tensor:
        """Return the input (d,) for <BOS>, <PLAN>, <NULL> or <DROPPED>, in the dtype of the table."""
        return self.table[row] + self.type_embedding[0]

    def sep(self, i: int) -> torch.Tensor:
        """Return the input (d,) for the separator of type `i`, in the dtype of the table."""
        return self.typed(self.table[self.vocabulary.sep(i)], i)

    def queries(self, i: int) -> torch.Tensor:
        """Return the inputs (quota, d) for the queries of type `i`, in the dtype of the table."""
        return self.typed(self.table[self.vocabulary.queries(i)], i)

    def concepts(self, i: int) -> torch.Tensor:
        """Return the rows (V_i, d) of the concepts of type `i`, without type embedding, in the dtype of the table."""
        return self.table[self.vocabulary.concepts(i)]

    def typed(self, embeds: torch.Tensor, i: int) -> torch.Tensor:
        """Add the type embedding.

        Args:
            embeds (..., d): floating point.
            i: the type.

        Returns:
            (..., d) in the wider of both dtypes.
        """
        return embeds + self.type_embedding[i + 1]


def text_embeds(backbone: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    """Return the inputs (..., d) for tokens (...) of text."""
    embeds = backbone.get_input_embeddings()(input_ids)
    return embeds + backbone.unified_head.type_embedding[0].to(embeds.dtype)


def concept_embeds(backbone: nn.Module, plan: torch.Tensor) -> torch.Tensor:
    """Return the codewords (B, n, Q, d) of plans (B, n, Q), without types. They are arbitrary where there is no
    concept.
    """
    head = backbone.unified_head
    starts = [head.vocabulary.concepts(i).start for i in range(plan.shape[1])]
    return nn.functional.embedding(plan.clamp(min=0) + plan.new_tensor(starts)[:, None], head.table)


def attach_planner(model: PreTrainedModel, config: PlannerConfig | None = None) -> PreTrainedModel:
    """Add a `SharedBackboneUnifiedHead` to a causal LM, in place. Attach before PEFT wraps the model.

    New rows have the root mean square of token embeddings. Concepts are larger if needed, so that noise does not
    dominate their logits. <BOS> starts from the model's own, if it has one. The global RNG is used. Nothing is frozen.

    Args:
        model: the causal LM.
        config: how to plan. None means the defaults.

    Returns:
        The same model.

    Raises:
        ValueError: the model already has a planner; is wrapped by PEFT; runs Unsloth's fast forwards; or its attention
            is not SDPA or eager over the whole text.
    """
    config = config or PlannerConfig()
    if isinstance(model, PeftModel):
        raise ValueError("the model is wrapped by PEFT already: attach the planner first, see with_planner_modules")
    if on_unsloth(model):
        raise ValueError(
            "the model runs Unsloth's fast forwards, which do not take our masks: load it with AutoModelForCausalLM"
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
    model.generation_config.use_cache = True  # a config saved in training may turn it off, and plans need it
    remember(model, METHOD, config)
    return model


@torch.no_grad()
def check_backbone(model: nn.Module) -> float:
    """Check that a decoder accepts the masks and positions of plans, and that hidden slots have no effect.

    Returns:
        The root mean square of its last hidden states, which depends on the final norm.

    Raises:
        ValueError: it does not.
    """
    backbone = backbone_of(model)
    embeds = backbone.get_input_embeddings()(trial_ids(model, 12))
    times = torch.arange(8, device=embeds.device)[None]
    lacks = f"{type(model).__name__} cannot plan: it does not take the masks and positions of plans"
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
    """Return the fields of a PEFT config that train and save the head in full. LoRA does not touch it: it has no linear
    layer.

    Raises:
        ValueError: the PEFT method has no `modules_to_save`.
    """
    return with_modules(config, METHOD)
