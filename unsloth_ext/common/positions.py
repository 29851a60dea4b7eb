"""The number of positions of a model."""

from torch import nn

from .wrapping import backbone_of


def learned_positions(model: nn.Module) -> int | None:
    """Return the number of positions of a model with a table of them (GPT-2), or None if positions are computed."""
    backbone = backbone_of(model)
    tables = [
        module.num_embeddings
        for module in backbone.modules()
        if isinstance(module, nn.Embedding) and module is not backbone.get_input_embeddings()
    ]
    return min(tables, default=None)
