"""How many positions a model has."""

from torch import nn

from .wrapping import backbone_of


def learned_positions(model: nn.Module) -> int | None:
    """How many positions a model with a table of them has (GPT-2); None where positions are computed."""
    backbone = backbone_of(model)
    tables = [
        module.num_embeddings
        for module in backbone.modules()
        if isinstance(module, nn.Embedding) and module is not backbone.get_input_embeddings()
    ]
    return min(tables, default=None)
