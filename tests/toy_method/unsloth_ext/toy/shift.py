"""The module, how it is attached, and the loader."""

from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel

from ..common.attaching import check_attachable, remember, with_modules
from ..common.generation_arguments import settle
from ..common.master_weights import MasterWeights, beside
from ..common.method_model import MethodModel
from .method import METHOD


@dataclass
class ToySettings:
    """How the shift is made. Saved in `latent_reasoning.json`.

    Attributes:
        std: standard deviation of the vector at first.
    """

    std: float = field(default=0.01)


class ToyShift(MasterWeights):
    """Embeddings (..., d) to embeddings (..., d), moved by a learned vector (d,)."""

    def __init__(self, d: int, std: float, **like):
        super().__init__()
        self.vector = nn.Parameter(torch.empty(d, **like).normal_(std=std))

    def forward(self, embeds: torch.Tensor) -> torch.Tensor:
        return embeds + self.vector.to(embeds.dtype)


def attach_toy(model: PreTrainedModel, settings: ToySettings | None = None) -> PreTrainedModel:
    """Give a causal LM its shift, in place. Attach before PEFT wraps the model."""
    settings = settings or ToySettings()
    backbone = check_attachable(model, METHOD)
    embedding = model.get_input_embeddings()
    backbone.toy_shift = ToyShift(embedding.weight.shape[1], settings.std, **beside(embedding.weight))
    embedding.register_forward_hook(lambda _, __, embeds: backbone.toy_shift(embeds))
    remember(model, METHOD, settings)
    return model


def with_toy_modules(config: PeftConfig) -> dict[str, Any]:
    """The fields of a PEFT config that make it train and save the shift."""
    return with_modules(config, METHOD)


class ToyModel(MethodModel):
    """A model with its shift, and its tokenizer."""

    method = METHOD

    def generate(self, text: str, **kwargs: Any) -> str:
        """What the model writes behind a text; keywords as for `generate`."""
        settle(self.model, METHOD.name, kwargs)
        inputs = self.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        return self.tokenizer.decode(self.model.generate(**inputs, **kwargs)[0], skip_special_tokens=True)
