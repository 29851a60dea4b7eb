"""Patch of how TRL reads the weights that it pushes to vLLM: adapters are merged into copies.

TRL 1.15 merges the adapters into the model, reads it, and takes them out again. That rounds the base weights at each
push. In bfloat16 the roundings add up: after some hundred steps the adapter no longer belongs to the base model that it
is saved for. Where FSDP2 or ZeRO-3 shards the model, it merges pieces. With FSDP2 it also sends a tied head, and vLLM
refuses that name.
"""

import contextlib
import functools
import types
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from accelerate.utils import is_peft_model

from .registry import Patch, Site, applied


NAME = "vllm_pushed_weights"
Gather = Callable[[Any], contextlib.AbstractContextManager[Any]]
_gather: ContextVar[Gather] = ContextVar(NAME, default=contextlib.nullcontext)
# In place of TRL's `DistributedBackend`, while all weights are gathered
_ONE_PROCESS = types.SimpleNamespace(is_fsdp=False, gather_params=contextlib.nullcontext)


@contextlib.contextmanager
def pushed_weights(gather: Gather) -> Iterator[None]:
    """Apply the patch in the block.

    Args:
        gather: returns a context manager, in which a model with adapters has whole weights.
    """
    token = _gather.set(gather)
    try:
        with applied(NAME):
            yield
    finally:
        _gather.reset(token)


def _merged(layers: list[Any]) -> dict[int, torch.Tensor]:
    """Merge the adapters of these layers, copy their base weights, and put the old ones back.

    Returns:
        The copies, by the address of the old weight.
    """
    parameters = {p: p.data for layer in layers for p in layer.get_base_layer().parameters(recurse=False)}
    try:
        for parameter, data in parameters.items():
            parameter.data = data.clone()
        for layer in layers:
            layer.merge()
        return {data.data_ptr(): parameter.data.clone() for parameter, data in parameters.items()}
    finally:
        for layer in layers:
            if layer.merged:
                layer.unmerge()  # also what a kind of adapter remembers of its merge
        for parameter, data in parameters.items():
            parameter.data = data


def _sites(*owners: Any) -> list[Site]:
    from trl.generation.vllm_generation import VLLMGeneration

    return [(owner, "_iter_named_params") for owner in owners or (VLLMGeneration,)]


def _wrap(original: Any) -> Any:
    from peft.tuners.tuners_utils import BaseTunerLayer

    @functools.wraps(original)
    def named_params(self: Any) -> Iterator[tuple[str, torch.Tensor]]:
        if not is_peft_model(self.model):
            return untied_params(self)
        return merged_params(self, _gather.get())  # another thread may read on, and would not know the variable

    def untied_params(self: Any) -> Iterator[tuple[str, torch.Tensor]]:
        model = self.model
        again = dict(model.named_parameters(remove_duplicate=False)).keys() - dict(model.named_parameters()).keys()
        yield from ((name, value) for name, value in original(self) if name not in again)

    def merged_params(self: Any, gather: Gather) -> Iterator[tuple[str, torch.Tensor]]:
        model, dist = self.model, self._dist
        with gather(model):
            adapted: dict[int, list[Any]] = defaultdict(list)  # layers by their weights; tied ones share a weight
            for layer in model.modules():
                if isinstance(layer, BaseTunerLayer):
                    for parameter in layer.get_base_layer().parameters(recurse=False):
                        adapted[parameter.data_ptr()].append(layer)
            model.merge_adapter = model.base_model._check_merge_allowed
            model.unmerge_adapter = lambda: None
            self._dist = _ONE_PROCESS
            merged: dict[int, torch.Tensor] = {}  # a layer's bias, while its weight is pushed
            try:
                for name, value in original(self):
                    place = value.data_ptr()
                    if place in adapted and place not in merged:
                        merged |= _merged(adapted[place])
                    yield name, merged.pop(place, value)
            finally:
                self._dist = dist
                del model.merge_adapter, model.unmerge_adapter

    return named_params


PATCH = Patch(
    name=NAME,
    package="trl",
    target="trl.generation.vllm_generation.VLLMGeneration._iter_named_params",
    parameters=("self",),
    sites=_sites,
    wrap=_wrap,
    places=(
        "trl/generation/vllm_generation.py:VLLMGeneration._iter_named_params",
        "peft/tuners/tuners_utils.py:BaseTuner.merge_adapter",
    ),
    effect="Adapters are merged into copies, one layer at a time, also where FSDP2 or ZeRO-3 shards the model, and the "
    "base weights stay what they are. A tied head is not sent.",
    reason="HRPO, PPO and SPO with `use_vllm=True`, during a rollout",
    upstream="https://github.com/huggingface/trl/issues/6688",
    removable="when TRL restores the base weights, or pushes adapters",
    scoped=True,
)
