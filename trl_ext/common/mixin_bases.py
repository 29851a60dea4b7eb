"""Base classes of mixins for type checkers.

A type checker sees the class that a mixin is put before. At run time the base is `object`, as that class is not known
yet.
"""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import Trainer
    from trl import GRPOConfig, GRPOTrainer, SFTConfig
else:
    Trainer = GRPOTrainer = GRPOConfig = SFTConfig = object

__all__ = ["GRPOConfig", "GRPOTrainer", "SFTConfig", "Trainer"]
