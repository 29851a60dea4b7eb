"""Rows, models and trainers that the latent tests share."""

from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

from tests import tiny
from tests.trl_ext.hrpo import setups as hrpo
from trl_ext.latent.config import LatentArguments
from trl_ext.latent.grpo import LatentGRPOConfig, LatentGRPOTrainer
from trl_ext.latent.trainer import LatentTrainer
from unsloth_ext import LatentConfig, attach_latent


ROWS = [
    {"question": f"{a}+{b}+{c}=", "steps": [f"{a}+{b}={a + b}", f"{a + b}+{c}={a + b + c}"], "answer": str(a + b + c)}
    for a in range(1, 6)
    for b in (2, 9)
    for c in (1, 12)
]
CASES = {
    "sequential": {"num_latents": 3, "iterations": None, "projection_dim": 16},
    "jacobi": {"num_latents": 5, "iterations": 3, "codi_skip_embeddings": True},
    "kv": {"num_latents": 6, "iterations": 2, "projection_dim": 16, "w_kv": 1.0, "kv_std_mode": "divide_loss"},
    "sequential, read": {"num_latents": 3, "iterations": None, "projection_dim": 16, "w_latent_ce": 1.0},
    "jacobi, read": {"num_latents": 5, "iterations": 3, "w_latent_ce": 1.0},
    "last pass, read": {
        "num_latents": 20,
        "iterations": 2,
        "w_latent_ce": 1.0,
        "latent_ce_passes": "last",
        "latent_ce_tokens": "first",
    },
    "sequential, written": {"num_latents": 1, "iterations": None, "projection_dim": 16, "w_step_decoder": 1.0},
    "jacobi, written": {"num_latents": 1, "iterations": 2, "w_step_decoder": 1.0},
    "kv by rkv": {"num_latents": 10, "iterations": 2, "w_kv": 1.0, "kv_scorer": "rkv"},
}


# A fifth of the 20 rows in each stage: a step of four
STAGED = {
    "num_latents": 4,
    "latents_per_step": 2,
    "iterations": 2,
    "update": "own",
    "feedback_residual": True,
    "feedback_onto": "embedding",
    "drop_last_step": False,
    "w_latent_ce": 1.0,
    "latent_ce_tokens": "steps",
    "stage_epochs": 0.2,
    "drop_later_steps": True,
}


@dataclass
class Config(LatentArguments, SFTConfig):
    pass


def trainer(folder, peft=True, family="qwen3", rows=ROWS, model=None, dataset=None, **changes):
    settings = tiny.short_run(folder, **{"answer_prompt": "##", "step_separator": ";", **changes})
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if peft else None
    return LatentTrainer(
        tiny.model(family, std=0.1) if model is None else model,
        Config(**settings),
        train_dataset=Dataset.from_list(rows) if dataset is None else dataset,
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=tiny.tokenizer(()),
        peft_config=lora,
    )


# How models think that GRPO trains
THINKING = {
    "CODI": {"num_latents": 3, "iterations": None, "projection_dim": 16},
    "PCCoT": {"num_latents": 4, "iterations": 2},
    "LOTUS": {
        "num_latents": 4,
        "iterations": 2,
        "update": "own",
        "feedback_residual": True,
        "feedback_onto": "embedding",
    },
}


def thinking_model(family="qwen3", kind="CODI"):
    """A model with latent tokens, and its tokenizer."""
    model, tokenizer = tiny.model(family, std=0.1), tiny.tokenizer(())
    attach_latent(model, tokenizer, LatentConfig(**THINKING[kind]))
    return model, tokenizer


def thinking_folder(tmp_path: Path) -> str:
    """The folder of such a model."""
    folder = tmp_path / "thinks"
    if not folder.exists():
        torch.manual_seed(0)
        for part in thinking_model():
            part.save_pretrained(folder)
    return str(folder)


def grpo(folder, family="qwen3", kind="CODI", peft=False, model=None, **changes):
    torch.manual_seed(0)
    made, tokenizer = thinking_model(family, kind)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if peft else None
    torch.manual_seed(0)
    return LatentGRPOTrainer(
        made if model is None else model,
        hrpo.reward_digits,
        hrpo.arguments(LatentGRPOConfig, folder / "out", **changes),
        train_dataset=hrpo.prompts(),
        processing_class=tokenizer,
        peft_config=lora,
    )


def trained(trainer) -> list[str]:
    """Names of the parameters that training moves."""
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    return sorted(n for n, p in trainer.model.named_parameters() if n in before and not torch.equal(p, before[n]))
