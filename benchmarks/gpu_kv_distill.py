"""The cases of KV distillation for gpu_check.py.

Losses are finite; student and projection are trained; a row has the same loss alone and in a batch.
"""

import tempfile
import time

import setups
import torch
import trl
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Qwen2Config

from trl_ext import KVDistillConfig, KVDistillTrainer


CASES = {
    "structured": {},
    "flat, warped": {"kv_projection_mode": "flat", "T_s": 48, "ratio_map": {"P": 1.0, "R": 0.5, "A": 1.0}},
    "Procrustes, teacher to student": {
        "kv_direction": "teacher_to_student",
        "kv_init": "procrustes",
        "freeze_aligner": True,
    },
}
# Deviation of the structural loss of a padded batch from the mean over its single rows, weighted by tokens
BOUNDS = {"float32": 1e-4, "bfloat16": 0.02, "4bit": 0.02}
STEPS = 3


def teacher_folder(folder: str) -> str:
    """A larger model with the student's vocabulary: three layers, 6 query heads and 3 KV heads of width 64."""
    student = AutoModelForCausalLM.from_pretrained(folder).config
    changes = {
        "hidden_size": 384,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "num_hidden_layers": 3,
        "layer_types": None,
    }
    torch.manual_seed(1)
    teacher = AutoModelForCausalLM.from_config(Qwen2Config(**{**student.to_dict(), **changes}))
    with torch.no_grad():
        for parameter in teacher.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.1)
    made = tempfile.mkdtemp()
    teacher.save_pretrained(made)
    return made


def train(folder: str, case: str, precision: str) -> dict:
    """Train a few steps, and measure agreement and learning."""
    args = KVDistillConfig(
        learning_rate=1e-3,
        **setups.few_steps(precision, STEPS),
        teacher_model_init_kwargs=setups.loading(precision),
        **CASES[case],
    )
    trainer = KVDistillTrainer(
        AutoModelForCausalLM.from_pretrained(
            folder, **setups.loading("float32" if precision == "float32" else "bfloat16")
        ),
        args,
        train_dataset=setups.reasoned(),
        processing_class=setups.tokenizer(AutoModelForCausalLM.from_pretrained(folder).config.vocab_size - 64),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        teacher_model=teacher_folder(folder),
    )
    started = time.perf_counter()
    learned = setups.watched(trainer, ["lora_", *([] if args.freeze_aligner else ["aligner"])])
    return {
        **learned,
        "seconds_per_step": round((time.perf_counter() - started) / STEPS, 3),
        "deviation": batch_deviation(trainer),
        "bound": BOUNDS[precision],
        "trainer": trl.SFTTrainer.__name__,
    }


@torch.no_grad()
def batch_deviation(trainer: KVDistillTrainer) -> float:
    """Deviation of the structural loss over rows of different lengths."""
    trainer.model.eval()
    names = ("input_ids", "labels", "segment_ids")
    rows = [{name: trainer.train_dataset[i][name] for name in names} for i in range(4)]

    def structural(some: list[dict]) -> float:
        inputs = {name: x.to(trainer.args.device) for name, x in trainer.data_collator(some).items()}
        with trainer.compute_loss_context_manager():
            trainer.compute_loss(trainer.model, inputs)
        return trainer._metrics["eval"]["kv/loss"][-1]

    lengths = [trainer.args.T_s or len(row["input_ids"]) for row in rows]
    alone = sum(structural([row]) * length for row, length in zip(rows, lengths, strict=True)) / sum(lengths)
    return abs(structural(rows) / alone - 1)
