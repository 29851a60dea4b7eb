"""Rows and trainers that these tests share."""

import torch
from datasets import Dataset
from peft import LoraConfig

from tests import tiny
from trl_ext import PlannerExecutorConfig, PlannerExecutorTrainer


# Texts of 2 to 8 tokens
ROWS = [
    {"prompt": f"{a}{'+' * b}{c}=", "completion": f"{a + c}{' so' * (a % 3)}"}
    for a in range(1, 5)
    for b in (1, 2)
    for c in (3, 9, 14)
]
TYPES = [{"name": "a", "num_concepts": 5, "quota": 3}, {"name": "b", "num_concepts": 4, "quota": 2}]
WAYS = [(ordering, multi) for ordering in ("sequential", "parallel") for multi in (False, True)]


def settings(folder, **changes):
    return tiny.short_run(folder, **{"types": TYPES, **changes})


def trainer(folder, peft=False, model=None, rows=ROWS, tokenizer=None, callbacks=None, **changes):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if peft else None
    made = PlannerExecutorTrainer(
        tiny.model("qwen3", std=0.15) if model is None else model,
        PlannerExecutorConfig(**settings(folder, **changes)),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        eval_dataset=Dataset.from_list((rows if isinstance(rows, list) else ROWS)[:8]),
        processing_class=tokenizer or tiny.tokenizer(()),
        peft_config=lora,
        callbacks=callbacks,
    )
    with torch.no_grad():  # undecided plans, of many lengths, however new models begin
        for name, parameter in made.model.named_parameters():
            if name.endswith("table"):
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return made


def batch_of(trainer, indices=range(4)):
    return trainer.data_collator([trainer.train_dataset[i] for i in indices])


def figures(trainer, mode="train"):
    """Of the batches since the last log, as they would be logged at the end of a step or of an evaluation."""
    sums, means = trainer._sums[mode].pop(lambda x: x)
    return {name: x.item() for name, x in sums.items() if name.startswith("loss/")} | means


def weights(trainer):
    return {name: parameter.detach().clone() for name, parameter in trainer.model.named_parameters()}


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]
