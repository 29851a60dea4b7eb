"""The runs of bench_real, on a tiny model: all of them work, and an interrupted one ends as if it had not been."""

import dataclasses
import math
import time

import pytest

from benchmarks import bench_real
from benchmarks.bench_real import RUNS, Budget, PausedError, Task, page, work_of
from patches import fused_lm_head
from tests import tiny
from tests.marks import slow


QUICK = ("SFT without steps", "LOTUS", "GRPO")
ROWS = [
    {"question": f"{a}*{b}+{b}=", "steps": [f"{a}*{b}={a * b}", f"{a * b}+{b}={a * b + b}"], "answer": str(a * b + b)}
    for a in range(1, 10)
    for b in range(1, 10)
]


@pytest.fixture
def task(tmp_path):
    fused_lm_head.ensure()
    tiny.model().save_pretrained(tmp_path / "start")
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
    "name", ["SFT with steps", slow("CODI, SIM-CoT"), slow("LOTUS"), slow("HRPO, soft embeddings")]
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
    assert pauses == len(range(task.budget.reinforced if name in bench_real.REINFORCED else task.budget.steps)) - 1
    assert parts["seconds"] > 0 and parts["accuracy"] == whole["accuracy"] and parts["texts"] == whole["texts"]
    for ours, theirs in zip(parts["curve"], whole["curve"], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


def copy_of(task, name):
    folder = task.folder / name
    folder.mkdir()
    (folder / "start").symlink_to(task.folder / "start")
    return folder
