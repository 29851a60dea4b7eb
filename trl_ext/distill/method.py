"""The record of logits and reasoning distillation."""

from ..common.method import TrainingMethod


METHOD = TrainingMethod(
    name="distill",
    about="Distillation from a teacher's next-token distributions, and from written reasoning with tags.",
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
