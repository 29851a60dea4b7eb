"""Rows, a teacher larger than its student, and trainers that these tests share."""

import torch
from datasets import Dataset
from peft import LoraConfig

from tests import tiny
from trl_ext import KVDistillConfig, KVDistillTrainer


ROWS = [
    {"prompt": f"{a}+{b}=", "completion": f"{a}+{b}={a + b}; {'so ' * (a % 3)}##{a + b}"}
    for a in range(1, 6)
    for b in (2, 9, 14, 7)
]


CASES = {
    "default": {},
    "flat": {"kv_projection_mode": "flat"},
    "note": {"kv_direction": "teacher_to_student", "kv_layer_map": "last"},
    "closed form": {"kv_direction": "teacher_to_student", "freeze_aligner": True, "kv_init": "procrustes"},
    "warped": {"T_s": 12, "ratio_map": {"P": 1, "R": 0.5, "A": 1}, "alpha_norm": 0.3},
    "heads of their own": {
        "share_dim_proj": False,
        "init_uniform": False,
        "rope_space": "pre",
        "kv_layer_map": "[0, 3]",
    },
}


WIDE = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 12, "hidden_size": 72}


def teacher(family="qwen3", std=0.2, **changes):
    """Four layers, 6 heads on 3 KV heads of width 12; the student has 2, 4 on 2, 8."""
    config = tiny.config(family)
    changes = {"num_hidden_layers": 4, "layer_types": None, **WIDE, **changes}
    config = type(config)(**{**config.to_dict(), **changes})
    return tiny.from_config(config, 7, std)


def settings(folder, **changes):
    return tiny.short_run(folder, **{"answer_delimiter": "##", "gradient_checkpointing": False, **changes})


def trainer(folder, peft=False, family="qwen3", model=None, rows=ROWS, given_teacher="tiny", tokenizer=None, **changes):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if peft else None
    return KVDistillTrainer(
        tiny.model(family, std=0.1) if model is None else model,
        KVDistillConfig(**settings(folder, **changes)),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=Dataset.from_list((rows if isinstance(rows, list) else ROWS)[:8]),
        processing_class=tokenizer or tiny.tokenizer(()),
        peft_config=lora,
        teacher_model=teacher(family) if given_teacher == "tiny" else given_teacher,
    )


def trained(trainer) -> dict[str, torch.Tensor]:
    """Every parameter after training, the projection's too."""
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer._named_trained().items()}
