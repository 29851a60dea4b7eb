"""Patch of transformers' model loading: with DeepSpeed ZeRO-3, models are made and loaded whole.

With ZeRO-3, transformers splits the weights while a model is made. Then a weight has no rows: no module can be attached by
its shape, and no weight can be copied. DeepSpeed also splits a whole model, when it prepares the model for training.
"""

import functools
from typing import Any

from .registry import Patch, Site


def _sites(*owners: Any) -> list[Site]:
    from peft.tuners.trainable_tokens import layer
    from peft.utils import integrations
    from transformers import modeling_utils

    peft = [(owner, "check_deepspeed_zero3_enabled") for owner in (integrations, layer)]
    return [(owner, "is_deepspeed_zero3_enabled") for owner in owners] or [
        (modeling_utils, "is_deepspeed_zero3_enabled"),
        *peft,
    ]


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def is_deepspeed_zero3_enabled() -> bool:
        return False

    return is_deepspeed_zero3_enabled


PATCH = Patch(
    name="zero3_loading",
    package="transformers",
    target="transformers.modeling_utils.is_deepspeed_zero3_enabled",
    parameters=(),
    sites=_sites,
    wrap=_wrap,
    places=(
        "transformers/modeling_utils.py:PreTrainedModel._from_config",
        "transformers/modeling_utils.py:PreTrainedModel.get_init_context",
    ),
    effect="With DeepSpeed ZeRO-3, models are made and loaded whole, and split when they are prepared.",
    reason="every trainer and loader of this package, while a model is made",
    upstream="no upstream issue is known",
    removable="when methods can be attached to weights that are split already",
    scoped=True,
)
