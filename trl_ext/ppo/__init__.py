"""Proximal Policy Optimization (arXiv 1707.06347) with a critic that values every token."""

from .config import PPOConfig
from .trainer import PPOTrainer


__all__ = ["PPOConfig", "PPOTrainer"]
