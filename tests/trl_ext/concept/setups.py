"""Rows and trainers that these tests share."""

import torch
from datasets import Dataset
from peft import LoraConfig

from tests import tiny
from trl_ext import ConceptConfig, ConceptTrainer


ROWS = [
    {"prompt": f"{a}+{b}=", "completion": f"{a}+{b}={a + b}; {'so ' * (a % 3)}##{a + b}"}
    for a in range(1, 6)
    for b in (2, 9, 14, 7)
]
CASES = {
    "literal": {},
    "stable": {
        **ConceptConfig.preset_fields("stable"),
        "target_ratio": 3.0,
        "warm_start_share": 0.5,
        "max_tail": 6,
        "temperature_end": 0.3,
    },
    "threshold": {"segmenter": "threshold", "gate": "factorised", "calibrate_null": True, "ratio_weight": 0.3},
    "fixed": {"segmenter": "fixed", "stride": 3, "num_codebooks": 2, "usage_weight": 0.2},
    "autoregressive": {
        "segmenter": "autoregressive",
        "max_tail": 5,
        "gate": "factorised",
        "ratio_weight": 0.5,
        "usage_weight": 0.1,
        "boundary_keeps_token": True,
    },
}


def base(family="qwen3", layers=4, std=0.1):
    config = tiny.config(family)
    config = type(config)(**{**config.to_dict(), "num_hidden_layers": layers, "layer_types": None})
    return tiny.from_config(config, 0, std)


def settings(folder, **changes):
    return tiny.short_run(folder, **{"gradient_checkpointing": False, **changes})


SPLIT = {"n_shallow": 1, "n_deep": 1, "num_concepts": 16}


def lora():
    return LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")


def trainer(folder, peft=False, family="qwen3", model=None, rows=ROWS, tokenizer=None, callbacks=None, **changes):
    torch.manual_seed(0)
    return ConceptTrainer(
        base(family) if model is None else model,
        ConceptConfig(**settings(folder, **{**SPLIT, **changes})),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:8]),
        processing_class=tokenizer or tiny.tokenizer(()),
        peft_config=lora() if peft else None,
        callbacks=callbacks,
    )


def trained(trainer) -> dict[str, torch.Tensor]:
    trainer.train()
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}
