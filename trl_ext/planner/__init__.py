"""Planner-executor: a plan of discrete concepts first, then text from it alone."""

from .config import PlannerExecutorConfig
from .trainer import PlannerExecutorTrainer


__all__ = ["PlannerExecutorConfig", "PlannerExecutorTrainer"]
