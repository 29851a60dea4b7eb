"""Single rows of an embedding, which PEFT trains one by one."""

import re
from collections.abc import Iterable
from typing import Any

from peft import PeftConfig
from torch import nn
from transformers import PreTrainedModel


def named(given: str | Iterable[str] | None, name: str) -> bool:
    """Whether `target_modules` or `modules_to_save` of a PEFT config name a module by its full name, as PEFT reads them."""
    if isinstance(given, str):
        return re.fullmatch(given, name) is not None
    return any(name == each or name.endswith(f".{each}") for each in given or ())


def check_rows(config: PeftConfig, model: PreTrainedModel, rows: str, modules: Iterable[nn.Module]) -> None:
    """Raises a ValueError if a PEFT config would train one of these modules otherwise than by single rows, or a head that
    is tied to them, which PEFT cannot do beside the rows.

    Args:
        rows: whose they are.
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
                    f"{how}, of which {rows} rows are trained one by one; leave it out"
                )
