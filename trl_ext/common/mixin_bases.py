"""What mixins inherit from: for a type checker the class that they are put before, and nothing at run time, when it is not
known yet."""

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from transformers import Trainer
    from trl import GRPOConfig, GRPOTrainer, SFTConfig
else:
    Trainer = GRPOTrainer = GRPOConfig = SFTConfig = object

__all__ = ["GRPOConfig", "GRPOTrainer", "SFTConfig", "Trainer"]
