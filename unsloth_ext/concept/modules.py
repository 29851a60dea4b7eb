"""The modules that a causal LM is given, and how its layers are split."""

from dataclasses import asdict, dataclass, field
from itertools import pairwise

import torch
from torch import nn
from transformers import PreTrainedModel

from ..kv.tap import check_sdpa
from ..residual import backbone_of


@dataclass
class OnlineConceptConfig:
    """How a model compresses while it reads and writes.

    Attributes:
        n_shallow, n_middle, n_deep: layers that run on every token, on concepts only, on concepts and the tail.
        num_concepts: codewords V; the head has one more output, `<NULL>`, for tokens that deep context does not keep.
    """

    n_shallow: int = field(default=4)
    n_middle: int = field(default=20)
    n_deep: int = field(default=4)
    num_concepts: int = field(default=4096)

    def __post_init__(self) -> None:
        for name in ("n_shallow", "n_middle", "n_deep", "num_concepts"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r}: a whole number, at least 1")

    @property
    def null(self) -> int:
        """The id of `<NULL>`."""
        return self.num_concepts

    @property
    def parts(self) -> tuple[range, range, range]:
        """Indices of the shallow, middle and deep layers."""
        ends = (0, self.n_shallow, self.n_shallow + self.n_middle, self.n_shallow + self.n_middle + self.n_deep)
        return tuple(range(start, stop) for start, stop in pairwise(ends))


class ConceptHead(nn.Linear):
    """Shallow hidden states (..., d) to logits (..., V + 1) over concepts and, last, `<NULL>`."""

    def __init__(self, d: int, num_concepts: int, **like):
        super().__init__(d, num_concepts + 1, **like)


class ConceptEmbedding(nn.Embedding):
    """Concept ids (...) to what the middle layers read (..., d). `<NULL>` has no row."""

    def __init__(self, d: int, num_concepts: int, std: float, **like):
        super().__init__(num_concepts, d, **like)
        nn.init.normal_(self.weight, std=std)


def attach_concepts(model: PreTrainedModel, config: OnlineConceptConfig | None = None) -> PreTrainedModel:
    """Give a causal LM its `ConceptHead` and `ConceptEmbedding`, in place. Draws from the global RNG.

    Concepts start as large as the hidden states that token embeddings are: with their root mean square.

    Raises:
        ValueError: the split does not add up to the model's layers, its attention is not SDPA over the whole text, or it
            has concepts already.
    """
    config = config or OnlineConceptConfig()
    backbone = backbone_of(model)
    layers = model.config.num_hidden_layers
    if config.parts[2].stop != layers:
        split = f"n_shallow={config.n_shallow}, n_middle={config.n_middle}, n_deep={config.n_deep}"
        raise ValueError(f"{split}: together {config.parts[2].stop}, the model has {layers} layers")
    if set(getattr(model.config, "layer_types", None) or ["full_attention"]) != {"full_attention"}:
        raise ValueError("layer_types: sliding windows would lose concepts; every layer must attend to the whole text")
    check_sdpa(model)
    if hasattr(backbone, "concept_config"):
        raise ValueError(f"{type(model).__name__} has concepts already")
    weight = model.get_input_embeddings().weight
    like = {"device": weight.device, "dtype": weight.dtype if weight.is_floating_point() else torch.float32}
    std = weight.detach().float().square().mean().sqrt().item()
    backbone.concept_head = ConceptHead(weight.shape[1], config.num_concepts, **like)
    backbone.concept_embedding = ConceptEmbedding(weight.shape[1], config.num_concepts, std, **like)
    backbone.concept_config = config
    model.config.concepts = asdict(config)
    return model
