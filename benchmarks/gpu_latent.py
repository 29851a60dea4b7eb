"""The cases of latent tokens for gpu_check.py.

Losses are finite; every part is trained; a question has the same states alone and in a batch.
"""

import time

import setups
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import trl_ext
from unsloth_ext import latent_phase
from unsloth_ext.latent.model import question_batch


CASES = ("CODI", "PCCoT", "KAVA")
# Deviation of latent hidden states between a padded batch and single rows, relative to their root mean square. States of
# wrong rows deviate by 1.4. In bf16, random weights amplify rounding from one latent token to the next
BOUNDS = {"float32": 1e-4, "bfloat16": 0.7, "4bit": 0.7}
STEPS = 3


def train(folder: str, method: str, precision: str) -> dict:
    """Train a few steps, and measure agreement and learning."""
    args = getattr(trl_ext, f"{method}Config")(
        num_latents=6,
        projection_dim=None if method == "PCCoT" else 64,
        answer_prompt=" so ",
        learning_rate=1e-3,
        **setups.few_steps(precision, STEPS),
    )
    rows = [
        {"question": "What is 12 plus 7? " * (1 + i % 3), "steps": ["12+7=19"] * (1 + i % 4), "answer": str(19 + i)}
        for i in range(24)
    ]
    model = AutoModelForCausalLM.from_pretrained(folder, **setups.loading(precision))
    trainer = getattr(trl_ext, f"{method}Trainer")(
        model,
        args,
        train_dataset=Dataset.from_list(rows),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    parts = ["lora_", "trainable_tokens", *(["latent_projection"] if args.projection_dim else [])]
    started = time.perf_counter()
    learned = setups.watched(trainer, parts)
    return {
        **learned,
        "seconds_per_step": round((time.perf_counter() - started) / STEPS, 3),
        "deviation": batch_deviation(trainer, [row["question"] for row in rows[:3]]),
        "bound": BOUNDS[precision],
        "trainer": trl.SFTTrainer.__name__,
    }


@torch.no_grad()
def batch_deviation(trainer, questions: list[str]) -> float:
    """Deviation of the latent hidden states over questions of different lengths."""
    model = trainer.model.eval()

    def states(asked: list[str]) -> torch.Tensor:
        batch = question_batch(trainer.processing_class, asked)
        return latent_phase(model, *(x.to(model.device) for x in batch.values())).hidden_states.float()

    together, alone = states(questions), torch.cat([states([question]) for question in questions])
    return ((together - alone).norm() / together.norm()).item()
