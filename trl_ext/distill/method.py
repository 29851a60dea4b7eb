"""The record of logits and reasoning distillation."""

from ..common.method import TrainingMethod


METHOD = TrainingMethod(
    name="distill",
    about="Distillation: a student follows a teacher's distributions, or its written reasoning between tags.",
    trainers={
        "LogitsDistillTrainer": "LogitsDistillConfig",
        "ReasoningDistillTrainer": "ReasoningDistillConfig",
    },
    exports={
        "LogitsDistillConfig": "config",
        "LogitsDistillTrainer": "logits",
        "ReasoningDistillConfig": "config",
        "ReasoningDistillTrainer": "reasoning",
    },
)
