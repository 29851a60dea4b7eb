"""Planner and executor: steps and answer are written from a plan of concepts alone. The control is SFT with steps."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.real.task import Task, completed
from trl_ext import PlannerExecutorConfig, PlannerExecutorTrainer
from trl_ext.planner.evaluation import evaluate_plans


# The types of planner_gsm8k.yaml, smaller, as 100 steps cannot train 5,000 codewords: 60 bits, which all numbers of a
# problem fit into. All concepts are planned in one pass, as in planner_tiny.yaml; one after another would cost ten passes
PLANNED: dict[str, dict[str, Any]] = {
    "planner and executor": {
        "types": [
            {"name": "plan", "num_concepts": 64, "quota": 8},
            {"name": "answer", "num_concepts": 64, "quota": 2},
        ],
        "target_length": [8, 2],
        "multi_token": True,
        "ordering": "parallel",
        "word_dropout": 0.1,
        "planner_learning_rate": 2e-3,
    },
}


def planned(task: Task, name: str) -> dict[str, Any]:
    """Planning from the question, and writing from the plan, from a random one, and without one."""
    base = task.start()
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = PlannerExecutorConfig(**task.common(name, task.budget.steps), max_length=None, **PLANNED[name])
    set_seed(task.seed)
    trainer = PlannerExecutorTrainer(
        AutoModelForCausalLM.from_pretrained(base),
        config,
        train_dataset=completed(task.train),
        processing_class=tokenizer,
    )
    cost = task.trained(trainer)
    found = evaluate_plans(
        trainer.model,
        tokenizer,
        completed(task.held_out),
        **task.decoding,
        show=3,
    )
    return cost | found.numbers() | {"texts": [written for _, _, written, _ in found.samples]}
