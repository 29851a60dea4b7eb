"""A checksum of a model's weights: whether an engine's copy of them is still the model's (ours)."""

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from .sharding import local


WIDTH = 1024  # of the rows that a vector is cut into
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(model: nn.Module) -> tuple:
    """Return what changes whenever a model's weights do, or what PEFT makes of them.

    It is made of the bit patterns of each parameter, weighted by row and by column, so it also sees rows that changed
    places. It costs two passes over the memory. If FSDP2 or ZeRO-3 shards the model, it is of this process's part.
    """
    sums = [one for value in model.parameters() for one in _weighted(local(value).detach())]
    layers = (module for module in model.modules() if isinstance(module, BaseTunerLayer))
    adapters = [(*layer.active_adapters, layer.disable_adapters, *_scaling(layer)) for layer in layers]
    return (*torch.stack([one.to(sums[0].device) for one in sums]).tolist(), *adapters)


def _weighted(value: torch.Tensor) -> list[torch.Tensor]:
    bits = value.view(INTEGERS[value.element_size()])
    if bits.dim() > 1:
        bits = bits.flatten(1)
    else:
        bits = nn.functional.pad(bits.flatten(), (0, -bits.numel() % WIDTH)).view(-1, WIDTH)
    sums = [bits.sum(dim, dtype=torch.int64) for dim in (0, 1)]
    return [(one * torch.arange(1, len(one) + 1, device=one.device)).sum() for one in sums]


def _scaling(layer: BaseTunerLayer) -> tuple:
    return tuple(getattr(layer, "scaling", {}).items())
