"""Distillation on SFTTrainer: from a teacher's logits, and from traces with tagged reasoning (MiniMind's two stages)."""

from .config import LogitsDistillConfig, ReasoningDistillConfig
from .logits import LogitsDistillTrainer
from .reasoning import ReasoningDistillTrainer


__all__ = ["LogitsDistillConfig", "LogitsDistillTrainer", "ReasoningDistillConfig", "ReasoningDistillTrainer"]
