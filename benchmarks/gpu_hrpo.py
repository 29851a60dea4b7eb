"""The cases of HRPO for gpu_check.py: rollout and training agree, and every part is trained."""

import sys
from unittest import mock

import setups
import torch
from datasets import Dataset

import trl_ext.hrpo.trainer as hrpo
from trl_ext import HRPOConfig, HRPOTrainer
from unsloth_ext import FastThinkingModel, ThinkingConfig, backbone_of


# Bounds of |p_train / p_rollout - 1| over the scored tokens of a step. In float32, of the largest. In bf16, of the mean,
# because a cached step and a full forward round differently and random weights amplify this: it is 0.02 to 0.11, or 0.75
# to 1.4 if the states are lost
LARGEST, MEAN = 1e-3, 0.15
CASES = [
    "projection frozen",
    "projection rollout",
    "projection jacobi",
    "soft_embedding frozen",
    "soft_embedding soft_bptt",
]
LEARNS = ("lora_", "thinking_residual_gate_r", "thinking_residual_gate_i", "thinking_residual_Lambda")
STEPS = 3


def train(folder: str, case: str, precision: str) -> dict:
    """Train a few steps, and measure agreement and learning."""
    source, mode = case.split()
    on_unsloth = "unsloth" in sys.modules
    projects = source == "projection" and mode != "frozen"  # a gradient reaches the projection
    exact = precision == "float32" and not (on_unsloth and setups.CUDA)  # Unsloth trains under bf16 autocast on a GPU
    means, largest = [], hrpo.ratio_deviation

    def mean_too(new: torch.Tensor, rollout: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        means.append(((new - rollout).exp() - 1).abs()[mask != 0].mean().item())
        return largest(new, rollout, mask)

    four_bit = precision == "4bit"
    model, tokenizer = FastThinkingModel.from_pretrained(
        folder,
        max_seq_length=512 if setups.CUDA else 256,  # from 512 on, Unsloth offloads activations to pinned memory
        dtype=torch.bfloat16 if four_bit else getattr(torch, precision),
        load_in_4bit=four_bit,
        device_map="cuda" if setups.CUDA else "cpu",
        thinking=ThinkingConfig(source, residual_r_min=0.8, residual_r_max=0.9),
        use_unsloth=on_unsloth,
    )
    model = FastThinkingModel.get_peft_model(model, r=16)
    torch.nn.init.normal_(backbone_of(model).thinking_projection.modules_to_save["default"].weight, std=0.05)
    args = HRPOConfig(
        thinking_source=source,
        recompute=mode,
        jacobi_iterations=64,
        num_generations=4,
        max_completion_length=64,
        temperature=0.5,
        learning_rate=1e-4,
        **setups.few_steps(precision, STEPS),
    )
    trainer = HRPOTrainer(
        model,
        lambda completions, **_: [float(len(text) % 7) for text in completions],
        args,
        train_dataset=Dataset.from_list([{"prompt": "What is 12 plus 7? " * (1 + i % 3)} for i in range(24)]),
        processing_class=tokenizer,
    )
    with mock.patch.object(hrpo, "ratio_deviation", mean_too):
        learned = setups.watched(trainer, [*LEARNS, *(["thinking_projection"] if projects else [])])
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        **learned,
        "seconds_per_step": round(min(entry["step_time"] for entry in steps), 3),
        "deviation": max(entry["thinking/ratio_deviation"] for entry in steps) if exact else max(means),
        "bound": LARGEST if exact else MEAN,
        "trainer": f"{HRPOTrainer.__mro__[1].__name__}",
        "thinking_fraction": steps[0]["thinking/fraction"],
    }
