"""Latent tokens, and plain SFT with and without steps, which is their control."""

from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, set_seed

from benchmarks.bench_latent import TRAINERS
from benchmarks.real.task import PROMPT, SEPARATOR, Task, answered
from unsloth_ext.common.ablations import ABLATIONS


EXPLICIT = {"SFT with steps": True, "SFT without steps": False}
# Latent tokens that the LM head reads, as in the shipped configurations. Each step that the teacher keeps has three, which
# stand for its result; where they are not read, it has one
READ = {"latents_per_step": 3, "latent_ce_tokens": "results", "w_latent_ce": 1.0}
LOOPED = {"iterations": 3}
LATENT_RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "CODI": ("codi", {**READ, "projection_dim": 576}),
    "PCCoT": ("pccot", {**READ, **LOOPED}),
    "KaVa": ("kava", {**READ, **LOOPED, "projection_dim": 576, "w_codi": 1.0, "w_kv": 1.0}),
    "LOTUS": ("lotus", {**READ, **LOOPED, "latent_ce_passes": "all", "stage_epochs": 0.1}),
    "CODI, SIM-CoT": ("codi", {"projection_dim": 576, "w_step_decoder": 1.0}),
    "PCCoT, not read": ("pccot", {**LOOPED, "latents_per_step": 3}),
    "CODI, not read": ("codi", {"projection_dim": 576}),
    "Coconut": ("coconut", {"latents_per_step": 1, "stage_epochs": 0.15, "reset_optimizer": False}),
}


def explicit(task: Task, name: str) -> dict[str, Any]:
    """Plain SFT: the controls of latent tokens."""
    base = task.start()
    trainer = task.sft(base, name, task.budget.steps, EXPLICIT[name])
    cost = task.trained(trainer)
    return cost | answered(trainer.model, AutoTokenizer.from_pretrained(base), task, ("off",))


def latent(task: Task, name: str) -> dict[str, Any]:
    """A method with latent tokens, with what it reads replaced, and with steps written."""
    method, changes = LATENT_RUNS[name]
    trainer_class, config_class = TRAINERS[method]
    base = task.start()
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = config_class(
        **task.common(name, task.budget.steps),
        **{"answer_prompt": PROMPT, "step_separator": SEPARATOR, "drop_last_step": True, **changes},
        num_latents=task.kept * changes.get("latents_per_step", 1),
    )
    epochs = task.budget.steps * task.budget.rows / len(task.train)
    config.stage_epochs *= epochs  # in `LATENT_RUNS` it is a share of the run
    set_seed(task.seed)
    trainer = trainer_class(base, config, train_dataset=Dataset.from_list(task.train), processing_class=tokenizer)
    cost = task.trained(trainer)
    return cost | answered(trainer.model, tokenizer, task, ("on", *ABLATIONS, "off"))
