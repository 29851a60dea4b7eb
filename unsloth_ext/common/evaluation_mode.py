"""Temporary evaluation mode that leaves the model trainable."""

import contextlib
from collections.abc import Iterator

from torch import nn

from .sharding import whole_weights


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Run the block in evaluation mode, then restore the mode.

    Weights that FSDP2 or ZeRO-3 shards are whole in the block.
    """
    never_pack(model)
    was = model.training
    model.eval()
    try:
        with whole_weights(model):
            yield
    finally:
        model.train(was)


def never_pack(model: nn.Module) -> None:
    """Keep bitsandbytes from packing 4-bit weights, which it does in evaluation mode on CPUs with AVX512-BF16.

    Version 0.50 cannot pack a layer narrower than a block of 64 weights. No gradient passes a packed layer, not even in
    later training.
    """
    for module in model.modules():
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False


def packed_layer(model: nn.Module) -> str | None:
    """Return the name of the first layer whose 4-bit weights are packed, or None."""
    for name, module in model.named_modules():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            return name
    return None
