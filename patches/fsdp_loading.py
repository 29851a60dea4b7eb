"""Switch with which every process loads the weights of a model, by accelerate's own variable.

With FSDP's `cpu_ram_efficient_loading`, transformers loads weights in the first process only. accelerate sends them to the
others when it prepares the model that is trained. Nothing sends those of a reference or a reward model, so TRL 1.15 shards
zeros.
"""

import os
from typing import Any

from .registry import Site, Switch


VARIABLE = "FSDP_CPU_RAM_EFFICIENT_LOADING"


def _sites(*_: Any) -> list[Site]:
    return [(os.environ, VARIABLE)]


PATCH = Switch(
    name="fsdp_loading",
    package="transformers",
    target=f"the environment variable {VARIABLE}",
    sites=_sites,
    value=lambda: "false",
    places=("transformers/distributed/fsdp.py:is_fsdp_enabled",),
    effect="Every process loads a model's weights, and not only the first.",
    reason="references and reward models on FSDP, while they are loaded",
    upstream="no upstream issue is known",
    removable="when TRL sends the weights of references and reward models to all processes",
    scoped=True,
)
