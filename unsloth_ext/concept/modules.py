"""The modules of concept compression, and attaching them to a causal LM (ours)."""

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
    """Linear head from shallow hidden states (..., d) to logits (..., C V + 1), for the codewords of each codebook and
    `<NULL>`.

    Args:
        d: the width of the model.
        config: how the model compresses.
        **like: device and dtype.

    Attributes:
        length_logits (max_tail,): float32 or wider, of the autoregressive segmenter. None for others.
    """

    def __init__(self, d: int, config: OnlineConceptConfig, **like):
        super().__init__(d, config.num_codebooks * config.num_concepts + 1, **like)
        wanted = config.segmenter == "autoregressive"
        self.length_logits = nn.Parameter(torch.zeros(config.max_tail, **like)) if wanted else None


class ConceptEmbedding(MasterWeights, nn.Embedding):
    """Embedding of concepts: the sum of one codeword of each codebook. `<NULL>` has no row.

    Args:
        d: the width of the model.
        config: how the model compresses.
        std: the standard deviation of a concept's initial embedding.
        **like: device and dtype.
    """

    def __init__(self, d: int, config: OnlineConceptConfig, std: float, **like):
        self.num_concepts = config.num_concepts
        super().__init__(config.num_codebooks * config.num_concepts, d, **like)
        nn.init.normal_(self.weight, std=std / config.num_codebooks**0.5)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed concepts (..., C) long. The result is (..., d) in the dtype of the weight."""
        offsets = self.num_concepts * torch.arange(ids.shape[-1], device=ids.device)
        return super().forward(ids + offsets).sum(-2)


@dataclass
class ConceptGate:
    """Settings of the head's decisions, which a trainer changes during training. They are not saved.

    Attributes:
        temperature: of the Gumbel softmax, in training.
        segment_as: other settings for the segmenter alone, e.g. a fixed stride at the beginning.
        rescore: maps scores (B, T) to other scores (B, T), to measure the value of the head's boundaries.
    """

    temperature: float = 1.0
    segment_as: OnlineConceptConfig | None = None
    rescore: Any = None


def attach_concepts(model: PreTrainedModel, config: OnlineConceptConfig | None = None) -> PreTrainedModel:
    """Add a `ConceptHead` and a `ConceptEmbedding` to a causal LM, in place. Its forward then compresses.

    `generate`, trainers and PEFT work as before. Concepts start with the root mean square of token embeddings. The
    global RNG is used.

    Args:
        model: the causal LM.
        config: how to compress. None means the defaults.

    Returns:
        The same model.

    Raises:
        ValueError: the split does not add up to the model's layers; its attention is not SDPA over the whole text; it
            runs Unsloth's fast forwards; or it already has concepts.
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
            "the model runs Unsloth's fast forwards, whose layers cannot be run separately: load it with "
            "AutoModelForCausalLM"
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
    backbone.__dict__["concept_causal_lm"] = model  # so that the model does not become a submodule of itself
    backbone.forward = types.MethodType(concept_forward, backbone)
    remember(model, METHOD, config)
    return model


def has_concepts(model: nn.Module) -> bool:
    """Return whether a causal LM, wrapped by PEFT or not, compresses."""
    return settings_of(model, METHOD) is not None


def with_concept_modules(config: PeftConfig) -> dict[str, Any]:
    """Return the fields of a PEFT config that train and save head and embedding in full and keep LoRA off them.

    Raises:
        ValueError: the PEFT method has no `modules_to_save`.
    """
    return with_modules(config, METHOD)
