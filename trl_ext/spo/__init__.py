"""Single-stream Policy Optimization (arXiv 2509.13232): one completion a prompt, a value that is tracked."""

from .config import SPOConfig
from .tracker import AutoAdaptiveValueTracker
from .trainer import SPOTrainer


__all__ = ["AutoAdaptiveValueTracker", "SPOConfig", "SPOTrainer"]
