"""Distillation through keys, values and attention of a teacher of another shape."""

from .config import KVDistillConfig
from .trainer import KVDistillTrainer


__all__ = ["KVDistillConfig", "KVDistillTrainer"]
