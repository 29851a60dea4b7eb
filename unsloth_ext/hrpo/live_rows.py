"""Forwards of `generate` without the rows that have ended.

transformers' loop feeds all rows until the last one ends. With `LiveRows` the loop still sees all rows: it draws the
same random numbers, and processors, criteria and streamers are called as before. Only the forward of the model is
given the rows that go on. The ended rows leave the cache. In the logits they repeat a row that goes on, since the loop
replaces their tokens by padding.
"""

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import DynamicCache, GenerationConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..common.compat import CACHE
from ..common.unsloth_decoding import on_unsloth


LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)  # these can drop rows


class LiveRows:
    """The rows that a decode still feeds to the model. All rows until `attach` and the first row that ends.

    Attributes:
        rows: indexes the live rows in a tensor with all rows.
        ended (B,): bool, set by the caller after each token. None before the first.
    """

    def __init__(self) -> None:
        self.rows: slice | torch.Tensor = slice(None)
        self.ended: torch.Tensor | None = None
        self._places: torch.Tensor | None = None

    def attach(self, model: PreTrainedModel) -> list[RemovableHandle]:
        """Make the forwards of a causal LM skip ended rows. Returns the handles of the hooks."""
        return [
            model.register_forward_pre_hook(self._narrow, with_kwargs=True),
            model.register_forward_hook(self._widen_logits),
        ]

    def widen(self, tensor: torch.Tensor) -> torch.Tensor:
        """Give a tensor of the live rows (B', ...) all rows (B, ...), of any dtype. Ended rows repeat a live one."""
        return tensor if self._places is None else tensor[self._places]

    def _narrow(self, _: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        cache: Any = kwargs.get(CACHE)
        if self.ended is None or not _separable(args, kwargs, len(self.ended)):
            return None
        live = ~self.ended[self.rows]
        kept = live.nonzero().squeeze(-1)
        if 0 < len(kept) < len(live):  # sharded models go on after the last row has ended
            cache.batch_select_indices(kept)
            self.rows = kept if isinstance(self.rows, slice) else self.rows[kept]
            self._places = torch.zeros_like(self.ended, dtype=torch.long)
            self._places[self.rows] = torch.arange(len(kept), device=kept.device)
        return args, {name: x[self.rows] if isinstance(x, torch.Tensor) else x for name, x in kwargs.items()}

    def _widen_logits(self, _: nn.Module, args: tuple, output: Any) -> Any:
        output.logits = self.widen(output.logits)
        return output


def _separable(args: tuple, kwargs: dict[str, Any], rows: int) -> bool:
    """Return whether the inputs of a forward can be cut to some of their rows."""
    cache: Any = kwargs.get(CACHE)
    if args or type(cache) is not DynamicCache or any(type(layer) not in LAYERS for layer in cache.layers):
        return False
    others = [x for name, x in kwargs.items() if name != CACHE and not isinstance(x, (bool, int))]
    return all(x is None or (isinstance(x, torch.Tensor) and x.dim() == 2 and len(x) == rows) for x in others)


def can_drop_rows(model: PreTrainedModel, config: GenerationConfig, cache: Any) -> bool:
    """Return whether nobody but the loop sees how many rows the forwards have.

    Args:
        model: the causal LM.
        config: the complete generation config.
        cache: the cache that `generate` passes to its loop, or None.
    """
    if on_unsloth(model) or config.return_dict_in_generate:  # which returns the cache
        return False
    if getattr(config, "_eos_token_tensor", None) is None:  # the loop then goes on sampling in ended rows
        return False
    if type(cache) is not DynamicCache or cache.offloading or getattr(cache, "_is_user_defined", False):
        return False
    # E.g. PEFT's hooks for `adapter_names`, one for each row. TRL's hook on the input embedding counts no rows
    inner = (module for module in model.modules() if module is not model.get_input_embeddings())
    return not any(module._forward_hooks or module._forward_pre_hooks for module in inner)
