"""The cases of SPO, PPO and the two distillations for gpu_check.py, on TRL's own trainers.

Losses are finite; policy, critic and student are trained; a row has the same logits alone and in a padded batch.
"""

import time
from typing import Any

import setups
import torch
import trl
from datasets import Dataset
from gpu_concept import BOUNDS, STEPS, off
from peft import LoraConfig
from transformers import AutoModelForCausalLM

import trl_ext


CASES = ("SPO", "PPO", "LogitsDistill", "ReasoningDistill")
DISTILLED = {
    "LogitsDistill": {},
    "ReasoningDistill": {"tags": ["####", "="]},
}


def train(folder: str, case: str, precision: str) -> dict:
    """Train a few steps, and measure agreement and learning. LoRA is used in 4 bits, otherwise all weights are trained."""
    model = AutoModelForCausalLM.from_pretrained(folder, **setups.loading(precision))
    tokenizer = setups.tokenizer(model.config.vocab_size - 64)
    adapted = precision == "4bit"
    trainer = getattr(trl_ext, f"{case}Trainer")(
        model,
        args=getattr(trl_ext, f"{case}Config")(
            learning_rate=1e-3,
            gradient_checkpointing=False,
            **setups.few_steps(precision, 2 * STEPS),
            **arguments(case),
        ),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM") if adapted else None,
        **given(case, folder),
    )
    started = time.perf_counter()
    learned = setups.watched(trainer, ["lora_" if adapted else "q_proj", *(["critic"] if case == "PPO" else [])])
    seconds = round((time.perf_counter() - started) / (2 * STEPS), 3)
    return {
        **learned,
        "seconds_per_step": seconds,
        "deviation": padding(trainer),
        "bound": BOUNDS[precision],
        "trainer": trl.GRPOTrainer.__name__ if case in ("SPO", "PPO") else trl.SFTTrainer.__name__,
    }


def arguments(case: str) -> dict[str, Any]:
    if case in DISTILLED:
        return {"max_length": None, **DISTILLED[case]}
    return {"max_completion_length": 32, "num_iterations": 2, "beta": 0.0}


def given(case: str, folder: str) -> dict[str, Any]:
    if case in DISTILLED:
        teacher = {"teacher_model": folder} if case == "LogitsDistill" else {}
        return {"train_dataset": setups.reasoned(), **teacher}
    rows = [{"prompt": f"What is {i} plus 7? " * (1 + i % 3)} for i in range(24)]
    return {
        "train_dataset": Dataset.from_list(rows),
        "reward_funcs": lambda completions, **_: [len(text) % 7 / 7 for text in completions],
        **({"critic_model": folder} if case == "PPO" else {}),
    }


@torch.no_grad()
def padding(trainer: Any) -> float:
    """Deviation of the logits of left-padded rows of different lengths from those of single rows."""
    model, tokenizer = trainer.model.eval(), trainer._tokenizer
    texts = ["What is 12 plus 7? 19", "12 + 7 = 19. #### 19 and what is 19 plus 12?"]
    batch = tokenizer(texts, return_tensors="pt", padding=True).to(trainer.args.device)
    with trainer.compute_loss_context_manager():
        ids, mask = batch["input_ids"], batch["attention_mask"]
        padded = model(input_ids=ids, attention_mask=mask).logits
        alone = [model(input_ids=row[there.bool()][None]).logits[0] for row, there in zip(ids, mask, strict=True)]
    return off(torch.cat([rows[there.bool()] for rows, there in zip(padded, mask, strict=True)]), torch.cat(alone))
