"""KV distillation: the common start teaches a student with half of its layers. The control learns from the rows alone."""

from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from benchmarks.bench_concept import prune
from benchmarks.real.task import PROMPT, Task, answered, completed
from trl_ext import KVDistillConfig, KVDistillTrainer


DISTILLED: dict[str, dict[str, Any]] = {
    "KV distillation to half of the layers": {},
    "half of the layers, cross-entropy alone": {"lambda_kv": 0.0},
}


def distilled(task: Task, name: str) -> dict[str, Any]:
    """A student whose layers follow those of the teacher that they come from, or the same student by SFT."""
    base = task.start()
    tokenizer = AutoTokenizer.from_pretrained(base)
    student = AutoModelForCausalLM.from_pretrained(base)
    kept = prune(student, student.config.num_hidden_layers // 2)
    config = KVDistillConfig(
        **task.common(name, task.budget.steps),
        max_length=None,
        answer_delimiter=PROMPT,
        kv_layer_map=str(kept),
        **DISTILLED[name],
    )
    set_seed(task.seed)
    trainer = KVDistillTrainer(
        student, config, train_dataset=completed(task.train), processing_class=tokenizer, teacher_model=base
    )
    before = answered(trainer.model, tokenizer, task, ("off",))["accuracy"]
    cost = task.trained(trainer)
    return cost | {"before": before} | answered(trainer.model, tokenizer, task, ("off",))
