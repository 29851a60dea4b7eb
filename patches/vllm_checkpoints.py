"""Patch of vLLM's reader of `config.json`: a model with thinking modules gets the class of vLLM that thinks.

The class has the name of the stock one with `Hybrid` before it. The plugin registers it (`unsloth_ext/hrpo/vllm`). The
configuration of any other model is not changed. vLLM without the plugin cannot load thinking modules and says so.
"""

import functools
from typing import Any

from .registry import Patch, Site


KEY = "thinking"
PREFIX = "Hybrid"


def _sites(*owners: Any) -> list[Site]:
    from vllm.transformers_utils.config import HFConfigParser

    return [(owner, "parse") for owner in owners or (HFConfigParser,)]


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def parse(self, model, trust_remote_code, revision=None, code_revision=None, **kwargs):
        read, config = original(self, model, trust_remote_code, revision, code_revision, **kwargs)
        settings = getattr(config, KEY, None)  # another model may have something else of this name
        if isinstance(settings, dict) and "thinking_source" in settings and config.architectures:
            config.architectures = [_thinking(str(model), name) for name in config.architectures]
        return read, config

    return parse


def _thinking(model: str, name: str) -> str:
    from vllm import ModelRegistry

    hybrid = {each for each in ModelRegistry.get_supported_archs() if each.startswith(PREFIX)}
    if PREFIX + name not in hybrid:
        known = ", ".join(sorted(each.removeprefix(PREFIX) for each in hybrid))
        raise ValueError(
            f"{model} is a {name} with thinking modules, and vLLM can think with {known} only; decode it with "
            "hybrid_generate"
        )
    return PREFIX + name


PATCH = Patch(
    name="vllm_checkpoints",
    package="vllm",
    target="vllm.transformers_utils.config.HFConfigParser.parse",
    parameters=("self", "model", "trust_remote_code", "revision", "code_revision"),
    sites=_sites,
    wrap=_wrap,
    places=("vllm/transformers_utils/config.py:HFConfigParser.parse",),
    effect="vLLM opens a checkpoint that has thinking modules with its class that thinks; others are not changed.",
    reason="HRPO in vLLM: `vllm serve` and `LLM` need no further argument",
    upstream="no upstream issue is known",
    removable="when vLLM lets a plugin choose a class by the model's configuration",
)
