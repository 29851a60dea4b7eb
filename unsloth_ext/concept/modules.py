"""The modules that a causal LM is given, and how its layers are split."""

import types
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from ..common.attaching import check_attachable, remember, settings_of, with_modules
from ..common.attention_tap import check_sdpa
from ..common.embeddings import embedding_rms
from ..common.layer_kinds import check_layers
from ..common.master_weights import MasterLinear, MasterWeights, beside
from ..common.unsloth_decoding import on_unsloth
from ..common.wrapping import backbone_of
from .config import OnlineConceptConfig
from .method import METHOD


class ConceptHead(MasterLinear):
    """Shallow hidden states (..., d) to logits (..., C V + 1) over the concepts of each codebook and, last, `<NULL>`.

    Attributes:
        length_logits (max_tail,): of the autoregressive segmenter, else None.
    """

    def __init__(self, d: int, config: OnlineConceptConfig, **like):
        super().__init__(d, config.num_codebooks * config.num_concepts + 1, **like)
        wanted = config.segmenter == "autoregressive"
        self.length_logits = nn.Parameter(torch.zeros(config.max_tail, **like)) if wanted else None


class ConceptEmbedding(MasterWeights, nn.Embedding):
    """Concepts (..., C) long, a codeword of each codebook, to what the middle layers read (..., d). `<NULL>` has no row."""

    def __init__(self, d: int, config: OnlineConceptConfig, std: float, **like):
        self.num_concepts = config.num_concepts
        super().__init__(config.num_codebooks * config.num_concepts, d, **like)
        nn.init.normal_(self.weight, std=std / config.num_codebooks**0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        offsets = self.num_concepts * torch.arange(ids.shape[-1], device=ids.device)
        return super().forward(ids + offsets).sum(-2)


@dataclass
class ConceptGate:
    """How the head's decisions are taken now; a trainer changes it as training goes on. Not saved.

    Attributes:
        temperature: of the Gumbel softmax, in training.
        segment_as: other settings for the segmenter alone, such as a fixed stride to begin with.
        rescore: other scores (B, T) in place of the head's, to measure what its boundaries are worth.
    """

    temperature: float = 1.0
    segment_as: OnlineConceptConfig | None = None
    rescore: Any = None


def attach_concepts(model: PreTrainedModel, config: OnlineConceptConfig | None = None) -> PreTrainedModel:
    """Give a causal LM its `ConceptHead` and `ConceptEmbedding`, in place; from now on its forward compresses. `generate`,
    trainers and PEFT go on as before. Draws from the global RNG.

    Concepts start as large as the hidden states that token embeddings are: with their root mean square.

    Raises:
        ValueError: the split does not add up to the model's layers, its attention is not SDPA over the whole text, it runs
            Unsloth's fast forwards, or has concepts already.
    """
    from .forward import concept_forward
    from .layer_split import check_split

    config = config or OnlineConceptConfig()
    backbone = backbone_of(model)
    layers = model.config.num_hidden_layers
    if config.parts[2].stop != layers:
        split = f"n_shallow={config.n_shallow}, n_middle={config.n_middle}, n_deep={config.n_deep}"
        raise ValueError(f"{split}: together {config.parts[2].stop}, the model has {layers} layers")
    check_layers(model, "a concept")
    check_sdpa(model)
    if on_unsloth(model):
        raise ValueError(
            "the model runs Unsloth's fast forwards, whose layers cannot be run apart: load it with AutoModelForCausalLM"
        )
    check_attachable(model, METHOD)
    scale = check_split(model)
    weight = model.get_input_embeddings().weight
    like = beside(weight)
    std = embedding_rms(model.get_input_embeddings()) * scale
    backbone.concept_head = ConceptHead(weight.shape[1], config, **like)
    backbone.concept_embedding = ConceptEmbedding(weight.shape[1], config, std, **like)
    backbone.concept_gate = ConceptGate()
    backbone.concept_embed_scale = scale
    backbone.__dict__["concept_causal_lm"] = model  # not a submodule of itself
    backbone.forward = types.MethodType(concept_forward, backbone)
    remember(model, METHOD, config)
    return model


def has_concepts(model: nn.Module) -> bool:
    """Whether a causal LM, wrapped by PEFT or not, compresses."""
    return settings_of(model, METHOD) is not None


def with_concept_modules(config: PeftConfig) -> dict[str, Any]:
    """The fields of a PEFT config that make it train and save head and embedding in full, and LoRA leave them alone.

    Raises:
        ValueError: the PEFT method has no `modules_to_save`.
    """
    return with_modules(config, METHOD)
