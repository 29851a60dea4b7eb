"""Reinforcement: GRPO, which is the control, and HRPO."""

from typing import Any

import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.real.task import PROMPT, Task
from trl_ext import HRPOConfig, HRPOTrainer
from trl_ext.tasks.evaluation import evaluate
from trl_ext.tasks.reward import make_reward


OPEN = {"residual_r_min": 0.3, "residual_r_max": 0.7, "lr_residual_lambda": 1e-2, "lr_residual_gate": 1e-3}
REINFORCED: dict[str, dict[str, Any]] = {
    "GRPO": {"thinking": False},
    "HRPO, soft embeddings": {"thinking_source": "soft_embedding", **OPEN},
    "HRPO, soft embeddings, the paper's gates": {"thinking_source": "soft_embedding"},
}


def reinforced(task: Task, name: str) -> dict[str, Any]:
    """Reinforcement: GRPO, or HRPO with its states replaced."""
    changes = REINFORCED[name]
    base = task.start()
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    kind, trainer_class = (
        (HRPOConfig, HRPOTrainer) if changes.get("thinking", True) else (trl.GRPOConfig, trl.GRPOTrainer)
    )
    settings = task.common(name, task.budget.reinforced) | {
        "per_device_train_batch_size": 2 * task.budget.rows,
        "num_generations": 8,
        "max_completion_length": task.budget.most,
        "learning_rate": 2e-5,
        "temperature": 1.0,
        "beta": 0.0,
        "logging_steps": 1,
        "save_steps": 10,
    }
    if kind is HRPOConfig:
        settings |= {"answer_delimiter": PROMPT, **changes}
    set_seed(task.seed)
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(base),
        make_reward(PROMPT),
        kind(**settings),
        train_dataset=asked(task.train),
        processing_class=tokenizer,
    )
    held_out = asked(task.held_out)
    before = evaluate(trainer.model, tokenizer, held_out, **task.decoding, thinking="off")
    cost = task.trained(trainer)
    after = {
        state: evaluate(trainer.model, tokenizer, held_out, **task.decoding, thinking=state)
        for state in (("on", "zero", "shuffle", "noise") if kind is HRPOConfig else ("on",))
    }
    main = after["on"]
    return {
        **cost,
        "before": before.accuracy,
        **{key: getattr(main, key) for key in ("accuracy", "low", "high")},
        "forward_passes": main.mean_length,
        "texts": main.completions[:3],
        **{state: found.accuracy for state, found in after.items() if state != "on"},
    }


def asked(rows: list[dict[str, Any]]) -> Dataset:
    """Columns `prompt` and `answer`."""
    return Dataset.from_list([{"prompt": row["question"], "answer": row["answer"]} for row in rows])
