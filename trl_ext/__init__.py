"""Training side: trainers and configs that are drop-ins for TRL's, and what they measure. Names are made on first use, from
the TRL that is live.

`trl.GRPOTrainer` may be TRL's own class or the one that Unsloth generated; `HRPOTrainer` subclasses whichever it is at the
moment the name is asked for, so import Unsloth, if at all, before you use these names.
"""

import importlib

from .common.method import training_methods


_WHERE = {
    "RolloutDiagnostics": "common.rollout_diagnostics",
    "usage_kl_to_uniform": "common.codeword_usage",
} | {
    name: f"{method.name}.{module}" for method in training_methods().values() for name, module in method.exports.items()
}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)  # not kept: Unsloth may come later


def __dir__() -> list[str]:
    return __all__
