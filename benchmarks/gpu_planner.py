"""The cases of planner and executor for gpu_check.py.

Losses are finite; LoRA and the head are trained; writing concepts and tokens one by one agrees with a single pass.
"""

import time

import setups
import torch
import trl
from gpu_concept import BOUNDS, STEPS, off
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from trl_ext import PlannerExecutorConfig, PlannerExecutorTrainer
from unsloth_ext import execute_plan, executor_forward, executor_prefix, plan_log_probs, plan_soft
from unsloth_ext.common.logits import logits_of
from unsloth_ext.common.wrapping import unwrapped


TYPES = [{"name": "what", "num_concepts": 64, "quota": 4}, {"name": "how", "num_concepts": 16, "quota": 2}]
CASES = {
    "soft": {"target_length": [3.0, 1.0]},
    "soft, at once": {"multi_token": True, "ordering": "parallel"},
    "hard-EM": {"training": "hard_em"},
}
WRITTEN = 16


def train(folder: str, case: str, precision: str) -> dict:
    """Train a few steps, and measure agreement and learning."""
    model = AutoModelForCausalLM.from_pretrained(folder, **setups.loading(precision))
    trainer = PlannerExecutorTrainer(
        model,
        PlannerExecutorConfig(learning_rate=1e-3, types=TYPES, **setups.few_steps(precision, STEPS), **CASES[case]),
        train_dataset=setups.reasoned(),
        processing_class=setups.tokenizer(model.config.vocab_size - 64),
        peft_config=LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer._named_trained = lambda: dict(trainer.model.named_parameters())
    started = time.perf_counter()
    learned = setups.watched(trainer, ["lora_", "unified_head"])
    seconds = round((time.perf_counter() - started) / STEPS, 3)
    with trainer.compute_loss_context_manager():
        deviation = max(planned(trainer), written(trainer))
    return {
        **learned,
        "seconds_per_step": seconds,
        "deviation": deviation,
        "bound": BOUNDS[precision],
        "trainer": trl.SFTTrainer.__name__,
    }


def batch(trainer: PlannerExecutorTrainer) -> dict[str, torch.Tensor]:
    rows = [trainer.train_dataset[i] for i in range(6)]
    return {name: x.to(trainer.args.device) for name, x in trainer.data_collator(rows).items()}


@torch.no_grad()
def planned(trainer: PlannerExecutorTrainer) -> float:
    """Deviation of log p of sampled concepts, one by one with the cache, from one pass."""
    model, rows = trainer.model.eval(), batch(trainer)
    read = rows["plan_input_ids"], rows["plan_attention_mask"]
    soft = plan_soft(model, *read)
    once = plan_log_probs(model, *read, soft.ids)
    found, wanted = [], []
    for i, log_probs in enumerate(soft.log_probs):
        ids = soft.ids[:, i, : log_probs.shape[1]]
        there = ids >= 0
        found.append(log_probs.gather(-1, ids.clamp(min=0)[..., None])[..., 0][there])
        wanted.append(once[:, i, : log_probs.shape[1]][there])
    return off(torch.cat(found), torch.cat(wanted))


@torch.no_grad()
def written(trainer: PlannerExecutorTrainer) -> float:
    """Deviation of the logits of greedy texts, token by token, from one pass."""
    model, rows = trainer.model.eval(), batch(trainer)
    plans = plan_soft(model, rows["plan_input_ids"], rows["plan_attention_mask"]).ids
    out = execute_plan(
        model,
        plans,
        max_new_tokens=WRITTEN,
        min_new_tokens=WRITTEN,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    states = executor_forward(model, executor_prefix(model, plans), out.sequences)
    return off(torch.stack(out.logits, dim=1), logits_of(unwrapped(model), states))
