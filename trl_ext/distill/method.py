"""The record of logits and reasoning distillation."""

from ..common.method import Command, TrainingMethod


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
    commands=(
        Command(
            "train-distill",
            "logits distillation; the embedded default of MiniMind's stages",
            "recipes/minimind/distill.py",
            trainer="LogitsDistillTrainer",
            parent="SFTTrainer",
            paper="1503.02531",
            what="a teacher's distributions",
            evidence="53%, without a teacher 25%",
            data=("trl_ext.minimind.data:row_reader", "sft"),
        ),
        Command(
            "train-reason",
            "reasoning distillation; the embedded default of MiniMind's stages",
            "recipes/minimind/reason.py",
            trainer="ReasoningDistillTrainer",
            parent="SFTTrainer",
            what="a teacher's reasoning between tags, which weigh more",
            evidence="sums, thought between tags: 0% to 92%",
            data=("trl_ext.minimind.data:row_reader", "reason"),
        ),
    ),
)
