"""Discrete concept tokens: online compression."""

from .config import ConceptConfig
from .trainer import ConceptTrainer


__all__ = ["ConceptConfig", "ConceptTrainer"]
