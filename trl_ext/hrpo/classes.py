"""`HRPOConfig` and `HRPOTrainer`, made on first use from the GRPO classes in place: TRL's, or those that Unsloth
generated."""

import functools
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:  # for editors and type checkers, which do not run `__getattr__`
    from trl import GRPOConfig, GRPOTrainer

    from .config import HRPOArguments
    from .trainer import HRPOMixin

    class HRPOConfig(HRPOArguments, GRPOConfig): ...

    class HRPOTrainer(HRPOMixin, GRPOTrainer): ...


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

    if hasattr(parent, "unsloth_grpo_mini_batch"):
        from .unsloth import config_init

        HRPOConfig.__init__ = config_init(HRPOConfig, parent)  # type: ignore[method-assign]
    return _importable(HRPOConfig)


@functools.cache
def _trainer_class(parent: type) -> type:
    # Unsloth puts its class into TRL's module too, so `issubclass` cannot tell the two apart
    if hasattr(sys.modules.get(parent.__module__), "grpo_accumulated_loss"):
        from .unsloth import UnslothHRPOMixin as Mixin
    else:
        from .trainer import HRPOMixin as Mixin

    class HRPOTrainer(Mixin, parent):
        __doc__ = Mixin.__doc__

    return _importable(HRPOTrainer)


def _importable(cls: type) -> type:
    cls.__module__, cls.__qualname__ = "trl_ext", cls.__name__
    return cls
