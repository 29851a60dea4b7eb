"""Checkpoints of runs in two processes: resumed there, in one process, and on another engine."""

import json

import pytest
import torch

from tests.trl_ext.distill import setups as distill
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv

from .launch import launch


# With a last batch that is not full, accelerate would repeat rows in two processes
SETTINGS = {"max_steps": 4, "dataloader_drop_last": True}
SAVING = {"save_strategy": "steps", "save_steps": 2, **SETTINGS}
CASES = (
    "hrpo, LoRA",
    "latent, sequential",
    "latent, sequential, written",
    "latent grpo",
    "kv, default",
    "ppo",
    "planner",
    "concept, stable",
)
ENGINES = ("ddp", "fsdp2", "zero2", "zero3")
NO_ZERO3 = [("planner", "zero3"), ("latent, sequential, written", "zero3")]
RUN = [(case, engine) for case in CASES for engine in ENGINES if (case, engine) not in NO_ZERO3]
FAST = [("hrpo, LoRA", "fsdp2")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that saved after two of its four steps: its folder, and the checkpoint."""
    runs = {}

    def run(case, engine):
        if (case, engine) not in runs:
            folder = tmp_path_factory.mktemp("run")
            worker_files(folder)
            launch(engine, case, folder, settings=SAVING, name="whole")
            (checkpoint,) = folder.rglob("checkpoint-2")
            runs[case, engine] = folder, checkpoint
        return runs[case, engine]

    return run


def worker_files(folder):
    hrpo.base_folder(folder)
    distill.teacher().save_pretrained(folder / "teacher")
    kv.teacher().save_pretrained(folder / "kv_teacher")


def weights(folder, name):
    return torch.load(folder / f"{name}0.pt")


def check_resume(whole, case, engine):
    folder, checkpoint = whole(case, engine)
    assert not [file for file in checkpoint.rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".pkl", ".distcp")]
    launch(engine, case, folder, settings=SETTINGS, resume=str(checkpoint), name="resumed")
    before, after = weights(folder, "whole"), weights(folder, "resumed")
    assert before.keys() == after.keys()
    different = [name for name in before if not torch.equal(before[name], after[name])]
    assert not different


@pytest.mark.parametrize("case, engine", FAST)
def test_a_resumed_run_is_the_uninterrupted_one(whole, case, engine):
    """Bit for bit."""
    check_resume(whole, case, engine)


@pytest.mark.engines
@pytest.mark.parametrize("case, engine", [cell for cell in RUN if cell not in FAST])
def test_every_resumed_run_is_the_uninterrupted_one(whole, case, engine):
    """Bit for bit."""
    check_resume(whole, case, engine)


# From one engine or number of processes to another
ACROSS = [("ddp", "one"), ("one", "ddp"), ("fsdp2", "one"), ("one", "fsdp2")]
ACROSS_DEEPSPEED = [("zero2", "one"), ("one", "zero2"), ("zero3", "fsdp2"), ("ddp", "zero3"), ("zero2", "ddp")]
SAME_EVERYWHERE = ("latent, sequential", "kv, default", "logits")


def check_across(whole, case, before, after):
    """float32; sums in another order, through four steps of AdamW of 3e-3 each."""
    folder, checkpoint = whole(case, before)
    launch(after, case, folder, settings=SETTINGS, resume=str(checkpoint), name=f"on {after}")
    theirs, ours = weights(folder, "whole"), weights(folder, f"on {after}")
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("before, after", ACROSS[:1])
def test_a_run_goes_on_elsewhere(whole, before, after):
    check_across(whole, "kv, default", before, after)


@pytest.mark.engines
@pytest.mark.parametrize("before, after", ACROSS + ACROSS_DEEPSPEED)
@pytest.mark.parametrize("case", SAME_EVERYWHERE)
def test_every_run_goes_on_elsewhere(whole, case, before, after):
    check_across(whole, case, before, after)


@pytest.mark.engines
@pytest.mark.parametrize("before, after", [("ddp", "one"), ("one", "fsdp2"), ("zero2", "one")])
@pytest.mark.parametrize("case", ["hrpo", "ppo", "planner", "concept, stable"])
def test_runs_that_sample_go_on_elsewhere(whole, case, before, after):
    """Each process samples by itself, so the weights are others: the run ends at its last step."""
    folder, checkpoint = whole(case, before)
    launch(after, case, folder, settings=SETTINGS, resume=str(checkpoint), name=f"on {after}")
    logs = json.loads((folder / f"on {after}0.json").read_text())["logs"]
    assert len(logs) == 4


@pytest.mark.engines
def test_a_rollout_cannot_be_split_again(whole, tmp_path):
    worker_files(tmp_path)
    inside = {**SAVING, "num_iterations": 2, "save_steps": 1}
    launch("ddp", "hrpo", tmp_path, settings=inside, name="whole")
    (checkpoint,) = tmp_path.rglob("checkpoint-1")
    with pytest.raises(AssertionError, match="between two steps of one rollout"):
        launch("one", "hrpo", tmp_path, settings=inside, resume=str(checkpoint))


@pytest.mark.engines
@pytest.mark.parametrize("engine", ["fsdp2", "zero3"])
def test_a_run_that_begins_inside_a_rollout(tmp_path, engine):
    """Bit for bit. Soft embeddings call the head before any forward of the whole model."""
    worker_files(tmp_path)
    inside, case = {**SAVING, "num_iterations": 2, "save_steps": 1}, "hrpo, soft_embedding, rollout"
    launch(engine, case, tmp_path, settings=inside, name="whole")
    (checkpoint,) = tmp_path.rglob("checkpoint-1")
    launch(engine, case, tmp_path, settings=inside, resume=str(checkpoint), name="resumed")
    before, after = weights(tmp_path, "whole"), weights(tmp_path, "resumed")
    assert all(torch.equal(before[name], after[name]) for name in before)
