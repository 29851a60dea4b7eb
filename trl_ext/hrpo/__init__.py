"""HRPO: GRPO whose rollouts think in latent space (arXiv 2505.18454), with a trainable thinking projection.

`HRPOConfig` and `HRPOTrainer` are made from the GRPO classes that are live when they are first asked for.
"""

import functools
from dataclasses import dataclass


def __getattr__(name: str):
    if name == "HRPOConfig":
        import trl

        return _config_class(trl.GRPOConfig)
    if name == "HRPOTrainer":
        import trl

        return _trainer_class(trl.GRPOTrainer)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _config_class(parent: type) -> type:
    from .config import HRPOArguments

    @dataclass
    class HRPOConfig(HRPOArguments, parent):
        __doc__ = HRPOArguments.__doc__

    return _importable(HRPOConfig)


@functools.cache
def _trainer_class(parent: type) -> type:
    from .trainer import HRPOMixin

    class HRPOTrainer(HRPOMixin, parent):
        __doc__ = HRPOMixin.__doc__

    return _importable(HRPOTrainer)


def _importable(cls: type) -> type:
    cls.__module__, cls.__qualname__ = "trl_ext", cls.__name__
    return cls
