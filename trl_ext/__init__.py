"""Training side: configurations and trainers that are drop-ins for TRL's, with their losses and diagnostics.

Names are resolved on first use. `trl.GRPOTrainer` may be TRL's own class or the one that Unsloth generated, and
`HRPOTrainer` subclasses whichever is in place at that moment. So import Unsloth, if you use it, before you use these
names.
"""

import importlib

from unsloth_ext.common.method import public_names

from .common.method import training_methods


_WHERE = public_names(
    {
        "RolloutDiagnostics": "common.rollout_diagnostics",
        "usage_kl_to_uniform": "common.codeword_usage",
    },
    training_methods(),
)
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(
        importlib.import_module(f".{_WHERE[name]}", __name__), name
    )  # not cached: Unsloth may be imported later


def __dir__() -> list[str]:
    return __all__
