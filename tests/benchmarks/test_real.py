"""The runs of bench_real, on a tiny model: all of them work, and an interrupted one ends as if it had not been."""

import dataclasses
import math
import time

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.bench_real import FAMILIES, REINFORCED, RUNS, page, work_of
from benchmarks.real.concept import EQUAL_COST
from benchmarks.real.task import Budget, PausedError, Task
from patches import fused_lm_head
from tests import tiny
from tests.marks import slow


QUICK = (
    *("SFT without steps", "LOTUS", "GRPO"),
    *("KV distillation to half of the layers", "concept tokens", EQUAL_COST, "planner and executor"),
)
LAYERS = 16  # more than the eight that read tokens beside concepts
ROWS = [
    {"question": f"{a}*{b}+{b}=", "steps": [f"{a}*{b}={a * b}", f"{a * b}+{b}={a * b + b}"], "answer": str(a * b + b)}
    for a in range(1, 10)
    for b in range(1, 10)
]


@pytest.fixture
def task(tmp_path):
    fused_lm_head.ensure()
    config = tiny.config("llama")
    config.num_hidden_layers = LAYERS
    tiny.from_config(config).save_pretrained(tmp_path / "start")
    tiny.tokenizer(()).save_pretrained(tmp_path / "start")
    budget = Budget(rows=4, warm_up=1, steps=4, reinforced=2, held_out=4, most=12)
    return Task(budget, ROWS[:-4], ROWS[-4:], 1, tmp_path, 0, math.inf)


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in RUNS])
def test_a_run_ends_with_what_its_table_shows(task, name):
    found = work_of(name)(task, name)
    assert 0 <= found["low"] <= found["accuracy"] <= found["high"] <= 1 and found["seconds"] > 0
    assert found["curve"][-1]["step"] <= task.budget.steps
    shown = page({"results": {name: {"0": found}}, "made_with": {"budget": "small", "dataset": "legs"}})
    assert f"| {name} | {found['accuracy']:.1%} |" in shown


@pytest.mark.parametrize(
    "name",
    [
        "SFT with steps",
        slow("CODI, SIM-CoT"),
        slow("LOTUS"),
        slow("HRPO, soft embeddings"),
        slow("KV distillation to half of the layers"),
        slow("concept tokens"),
        slow("planner and executor"),
    ],
)
def test_a_paused_run_goes_on_as_if_it_had_not_been(task, name):
    """After each step it stops and is built again; the losses are those of an uninterrupted run, to 1e-6."""
    whole = work_of(name)(dataclasses.replace(task, folder=copy_of(task, "whole")), name)
    again = dataclasses.replace(task, folder=copy_of(task, "again"))
    pauses = 0
    while pauses < 10:
        again.until = time.monotonic()
        try:
            parts = work_of(name)(again, name)
            break
        except PausedError:
            pauses += 1
    assert pauses == len(range(task.budget.reinforced if name in REINFORCED else task.budget.steps)) - 1
    assert parts["seconds"] > 0 and parts["accuracy"] == whole["accuracy"] and parts.get("texts") == whole.get("texts")
    assert parts.get("nll") == pytest.approx(whole.get("nll"), abs=1e-6)
    for ours, theirs in zip(parts["curve"], whole["curve"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def test_every_run_is_of_one_family():
    assert sorted(RUNS) == sorted(name for runs, _ in FAMILIES for name in runs)


class BuiltError(Exception):
    """Raised in place of training."""


def built(task, name, monkeypatch):
    """The trainer of a run, before training."""
    found = []

    def stop(_, trainer):
        found.append(trainer)
        raise BuiltError

    monkeypatch.setattr(Task, "trained", stop)
    with pytest.raises(BuiltError):
        work_of(name)(task, name)
    return found[0]


def test_a_student_follows_the_layers_that_it_is_made_of(task, monkeypatch):
    """Both students are the same; only one has a teacher."""
    taught = built(task, "KV distillation to half of the layers", monkeypatch)
    alone = built(task, "half of the layers, cross-entropy alone", monkeypatch)
    whole = AutoModelForCausalLM.from_pretrained(task.start()).model.layers
    assert len(taught.aligner.layers) == LAYERS // 2 and alone.aligner is alone.teacher is None
    for trainer in (taught, alone):
        assert len(trainer.model.model.layers) == LAYERS // 2
        for ours, theirs in zip(trainer.model.model.layers, taught.aligner.layers, strict=True):
            assert torch.equal(ours.mlp.up_proj.weight, whole[theirs].mlp.up_proj.weight)


def test_controls_of_concepts_have_all_layers_or_those_of_equal_cost(task, monkeypatch):
    """Eight layers read every token, eight a quarter of them, and the head of concepts is as large as two layers."""
    layers = {
        name: built(task, name, monkeypatch).model.config.num_hidden_layers for name in (EQUAL_COST, "LoRA, all layers")
    }
    assert layers == {EQUAL_COST: 12, "LoRA, all layers": LAYERS}


def copy_of(task, name):
    folder = task.folder / name
    folder.mkdir()
    (folder / "start").symlink_to(task.folder / "start")
    return folder
