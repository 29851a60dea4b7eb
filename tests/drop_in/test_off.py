"""With its method turned off, a trainer is its parent in TRL: bit for bit on a CPU."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import patches

from .trainers import CASES


TIMED = ("time", "per_second")
MORE = {"GRPOTrainer": {"num_iterations": 2, "beta": 0.05}, "SFTTrainer": {"eval_strategy": "steps", "eval_steps": 2}}
OFF = [case for case in CASES if case.off is not None]


def history(trainer, known=None):
    return [
        {k: v for k, v in entry.items() if not any(t in k for t in TIMED) and (known is None or k in known[i])}
        for i, entry in enumerate(trainer.state.log_history)
    ]


@pytest.mark.parametrize("changes", ["plain", "more"])
@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("case", OFF, ids=lambda case: case.name)
def test_off_it_is_its_parent_bit_for_bit(tmp_path, case, peft, changes):
    """Every logged figure but times, and every parameter after four steps."""
    given = {"gradient_accumulation_steps": 2, **MORE[case.parent]} if changes == "more" else {}
    runs = []
    for stock in (True, False):
        more = {"peft_config": LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")} if peft else {}
        if case.parent == "SFTTrainer":
            more["eval_dataset"] = Dataset.from_list(case.rows[:8])
        with patches.applied("fused_lm_head"):  # TRL's loss kernel needs a GPU where Triton is installed
            trainer = case.make(tmp_path, stock=stock, turned_off=not stock, max_steps=4, **given, **more)
            trainer.train()
        runs.append(trainer)
    stock, ours = runs
    assert len(stock.state.log_history) >= 5
    assert history(ours, stock.state.log_history) == history(stock)
    more = {k for entry in ours.state.log_history for k in entry} - {k for e in stock.state.log_history for k in e}
    assert all(name.endswith(("/tags", "/text")) for name in more)
    a, b = (dict(trainer.model.named_parameters()) for trainer in (ours, stock))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
