"""Rows, models and trainers that these tests share."""

from datasets import Dataset
from peft import LoraConfig
from transformers import Qwen3MoeConfig

from tests import tiny
from trl_ext import LogitsDistillConfig, LogitsDistillTrainer, ReasoningDistillConfig, ReasoningDistillTrainer


# Completions of 6 to 20 tokens, prompts of 4 to 7
ROWS = [
    {"prompt": f"{a}+{b}=", "completion": f"{a}+{b};{' so' * (a % 4)}##{a + b}"}
    for a in (1, 22, 3, 14)
    for b in (2, 9, 14, 7)
]
TAGGED = [
    {"prompt": row["prompt"], "completion": f"<think>{'so ' * (i % 3)}a<b</think><answer>{i}</answer>"}
    for i, row in enumerate(ROWS)
]
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PIECES = ("<", ">", "/")  # the tags as MiniMind's own tokenizer has them: several tokens


def config(**changes):
    """A student's: two layers, 64 rows of vocabulary."""
    base = tiny.config("qwen3")
    return type(base)(**{**base.to_dict(), **changes})


def moe_config(**changes):
    return Qwen3MoeConfig(
        **{
            **config().to_dict(),
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "router_aux_loss_coef": 0.05,
            "norm_topk_prob": True,
            **changes,
        }
    )


def model(config, seed=0, std=0.1):
    return tiny.from_config(config, seed, std)


def student(**changes):
    return model(config(**changes))


def teacher(**changes):
    """Wider, with eight rows of vocabulary more."""
    return model(config(**{"hidden_size": 48, "vocab_size": 72, **changes}), seed=7, std=0.3)


def settings(folder, **changes):
    return tiny.short_run(folder, **{"gradient_checkpointing": False, **changes})


def _common(rows, tokenizer, peft):
    return {
        "train_dataset": Dataset.from_list(rows),
        "eval_dataset": Dataset.from_list(rows[:8]),
        "processing_class": tokenizer,
        "peft_config": LoraConfig(**LORA) if peft is True else peft or None,
    }


def logits(folder, model=None, teacher_model="tiny", rows=ROWS, peft=False, tokenizer=None, given=None, **changes):
    """A LogitsDistillTrainer; `given` are its own keywords."""
    return LogitsDistillTrainer(
        student() if model is None else model,
        LogitsDistillConfig(**settings(folder, **changes)),
        teacher_model=teacher() if isinstance(teacher_model, str) and teacher_model == "tiny" else teacher_model,
        **_common(rows, tokenizer or tiny.tokenizer(()), peft),
        **(given or {}),
    )


def reasoning(folder, model=None, rows=TAGGED, peft=False, tokenizer=None, given=None, **changes):
    """A ReasoningDistillTrainer of a student that has exactly the tokenizer's rows before tags are added."""
    tokenizer = tokenizer or tiny.tokenizer(PIECES)
    return ReasoningDistillTrainer(
        student(vocab_size=len(tokenizer)) if model is None else model,
        ReasoningDistillConfig(**settings(folder, **changes)),
        **_common(rows, tokenizer, peft),
        **(given or {}),
    )


def batch_of(trainer, indices=range(4)):
    rows = [trainer.train_dataset[i] for i in indices]
    return trainer.data_collator(
        [{k: row[k] for k in ("input_ids", "labels", "seq_lengths") if k in row} for row in rows]
    )


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def trained(trainer):
    trainer.train()
    return weights(trainer)


def losses(trainer):
    """What was logged, without times and TRL's count of tokens, which starts anew when a run resumes."""
    without = ("runtime", "per_second", "num_tokens")
    return [{k: v for k, v in e.items() if not any(w in k for w in without)} for e in trainer.state.log_history]
