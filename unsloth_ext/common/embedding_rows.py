"""Checks for single rows of an embedding that PEFT trains."""

import re
from collections.abc import Iterable
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel


def named(given: str | Iterable[str] | None, name: str) -> bool:
    """Return whether `target_modules` or `modules_to_save` of a PEFT config name a module, by the rules of PEFT.

    Args:
        given: the field of the config.
        name: the full name of the module.

    Returns:
        True if the module is named.
    """
    if isinstance(given, str):
        return re.fullmatch(given, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in given or ())


def check_rows(config: PeftConfig, model: PreTrainedModel, rows: str, modules: Iterable[nn.Module]) -> None:
    """Check that a PEFT config does not also train whole modules, or heads tied to them, whose single rows are trained.

    PEFT cannot do both.

    Args:
        config: the PEFT config.
        model: the model that PEFT will wrap.
        rows: whose rows they are, for the message.
        modules: the modules with single trained rows.

    Raises:
        ValueError: the config names such a module.
    """
    weights = [module.weight for module in modules]
    for name, module in model.named_modules():
        if not any(getattr(module, "weight", None) is weight for weight in weights):
            continue
        for field, how in (("modules_to_save", "trained as a whole"), ("target_modules", "given an adapter")):
            found: Any = getattr(config, field, None)
            if named(found, name):
                raise ValueError(
                    f"{field}={found if isinstance(found, str) else sorted(found)}: {name.rpartition('.')[2]!r} would be "
                    f"{how}, but {rows} rows of it are trained one by one; leave it out"
                )
