"""A run's folder: one run at a time, nothing lost, nothing of another run resumed."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors import SafetensorError

from tests import tiny
from tests.processes import launch
from tests.trl_ext.common.test_checkpointing import sft
from trl_ext.cli import resuming, user_errors
from trl_ext.cli.recipe import start
from trl_ext.cli.resuming import claim
from trl_ext.common import run_folder
from trl_ext.common.checkpointing import CheckpointError, last_complete_checkpoint
from trl_ext.common.run_folder import FolderError, check_apart


def arguments(folder, resume=None, max_steps=4, epochs=3.0):
    return SimpleNamespace(
        output_dir=str(folder),
        resume_from_checkpoint=resume,
        max_steps=max_steps,
        num_train_epochs=epochs,
        process_index=0,
        world_size=1,
    )


def checkpoint(folder: Path, step: int, epoch: float = 0.5) -> Path:
    """As little of one as counts as whole."""
    made = folder / f"checkpoint-{step}"
    made.mkdir(parents=True)
    (made / "trainer_state.json").write_text(json.dumps({"global_step": step, "epoch": epoch}))
    return made


def ran(folder: Path, *steps: int) -> str:
    """A run that left checkpoints and results in a folder."""
    run, _ = claim(arguments(folder), False)
    for step in steps:
        run_folder.stamp(checkpoint(folder, step), run)
    (folder / "final").mkdir()
    (folder / "summary.json").write_text("{}")
    run_folder.finished(folder, max(steps))
    return run


def test_a_second_run_is_refused_by_name_with_the_ways_out(tmp_path):
    run = ran(tmp_path, 2, 4)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.name != "run.lock"}
    with pytest.raises(FolderError) as error:
        claim(arguments(tmp_path), False)
    for part in (str(tmp_path), run, "finished at step 4", "latest", "--overwrite", "--output_dir"):
        assert part in str(error.value)
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for _, path in run_folder.checkpoints(tmp_path):  # as with save_strategy "no": nothing to go on from
        shutil.rmtree(path)
    with pytest.raises(FolderError, match=r"finished at step 4\)\. Start over: --overwrite, .*another --output_dir"):
        claim(arguments(tmp_path), False)


def test_overwrite_deletes_what_a_run_made_and_nothing_else(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "kept").write_text("x")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    old = ran(tmp_path / "out", 2, 4)
    (tmp_path / "out" / "checkpoint-mine").mkdir()
    (tmp_path / "out" / "curves.png").symlink_to(tmp_path / "elsewhere")
    new, resume = claim(arguments(tmp_path / "out"), True)
    assert new != old and resume is None
    left = {path.name for path in (tmp_path / "out").iterdir()}
    assert left == {"notes.txt", "checkpoint-mine", "run.json", "run.lock"}
    assert (tmp_path / "elsewhere" / "kept").exists()


def test_overwrite_spares_what_the_run_begins_with(tmp_path, monkeypatch):
    for name in ("out/final", "out/checkpoint-2", "out/mine"):
        (tmp_path / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for flag, value in (("model_name", "out/final"), ("init_from", f"{tmp_path}/out/checkpoint-2/.")):
        with pytest.raises(FolderError, match=f"--overwrite deletes --{flag} {value}; choose another --output_dir"):
            start(arguments("out"), SimpleNamespace(**{"overwrite": True, "model_name": "tiny", flag: value}))
        assert Path(value).is_dir()
    check_apart(Path("out"), {"model_name": "out/mine", "output_dir": "out", "init_from": "final", "types": "x" * 5000})


def test_results_that_no_run_is_known_of_are_never_deleted(tmp_path):
    """Such as a model that somebody keeps in a folder called final."""
    (tmp_path / "final").mkdir()
    for overwrite in (False, True):
        with pytest.raises(FolderError, match=r"move it away"):
            claim(arguments(tmp_path), overwrite)
    assert (tmp_path / "final").exists()


def test_a_run_that_left_nothing_is_in_nobodys_way(tmp_path):
    first, _ = claim(arguments(tmp_path), False)
    assert claim(arguments(tmp_path), False)[0] != first


def test_latest_never_picks_another_runs_checkpoint(tmp_path):
    run = ran(tmp_path, 2, 4)
    run_folder.stamp(checkpoint(tmp_path, 90), "another run")
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert claim(arguments(tmp_path, "latest", 6), False) == (run, tmp_path / "checkpoint-4")


@pytest.mark.parametrize("asked", ["latest", "true", True, "checkpoint-2", "PATH"])
def test_going_on_keeps_the_runs_id(tmp_path, asked):
    run = ran(tmp_path, 2)
    asked = str(tmp_path / "checkpoint-2") if asked == "PATH" else asked
    assert claim(arguments(tmp_path, asked), False) == (run, tmp_path / "checkpoint-2")
    assert len(json.loads((tmp_path / "run.json").read_text())["commands"]) == 2


def test_the_branch_left_behind_is_not_the_latest(tmp_path):
    """Resumed from step 2 of 4 with other settings: what comes after is not step 4 of before."""
    ran(tmp_path, 2, 4)
    claim(arguments(tmp_path, "checkpoint-2"), False)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_a_folder_of_an_earlier_version_is_gone_on_with(tmp_path):
    old = checkpoint(tmp_path, 2)
    (tmp_path / "final").mkdir()
    run, found = claim(arguments(tmp_path, "latest"), False)
    assert found == old and run_folder.run_id(old) == run == run_folder.run_id(tmp_path)


def test_from_another_folder_begins_a_run(tmp_path):
    run = ran(tmp_path / "a", 2)
    new, found = claim(arguments(tmp_path / "b", str(tmp_path / "a" / "checkpoint-2")), False)
    assert new != run and found == tmp_path / "a" / "checkpoint-2" and run_folder.run_id(tmp_path / "a") == run


@pytest.mark.parametrize(
    "resume, more, message",
    [
        ("latest", {}, r"no steps left: .* step 4 of 4\. Ask for more with max_steps or num_train_epochs"),
        ("checkpoint-4", {}, r"no steps left.*--init_from .*checkpoint-4 and another --output_dir"),
        ("latest", {"max_steps": -1, "epochs": 0.5}, "no steps left"),
        (
            "checkpoint-500",
            {},
            r"checkpoint-500: no such folder here or in .* \(which has checkpoint-2, checkpoint-4\)",
        ),
    ],
)
def test_what_cannot_be_gone_on_with_is_said_and_nothing_is_touched(tmp_path, resume, more, message):
    ran(tmp_path, 2, 4)
    before = (tmp_path / "run.json").read_text()
    with pytest.raises(CheckpointError.__base__, match=message):
        claim(arguments(tmp_path, resume, **more), False, second_stage=True)
    assert (tmp_path / "run.json").read_text() == before


def test_the_trainer_itself_trains_no_step_too_many(tmp_path):
    """Where the number of steps comes from epochs, only it knows."""
    trainer = sft(tmp_path, tiny.model("llama"), max_steps=2, save_steps=2)
    trainer.train()
    weights = (tmp_path / "checkpoint-2" / "model.safetensors").read_bytes()
    again = sft(tmp_path, tiny.model("llama"), max_steps=2, save_steps=2)
    with pytest.raises(CheckpointError, match="no steps left: the checkpoint is at step 2 of 2"):
        again.train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-2" / "model.safetensors").read_bytes() == weights
    assert not (tmp_path / "checkpoint-3").exists()


def test_checkpoints_carry_the_run(tmp_path):
    run, _ = claim(arguments(tmp_path), False)
    sft(tmp_path, tiny.model("llama"), max_steps=2, save_steps=1).train()
    assert {run_folder.run_id(path) for _, path in run_folder.checkpoints(tmp_path)} == {run}


def test_resume_and_overwrite_contradict_each_other(tmp_path):
    ran(tmp_path, 2)
    with pytest.raises(FolderError, match="leave one of them out"):
        claim(arguments(tmp_path, "latest"), True)
    assert (tmp_path / "checkpoint-2").exists()


HOLD = """
import sys, time
from pathlib import Path
from trl_ext.common.run_folder import lock
lock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_two_runs_in_one_folder_and_the_lock_of_a_dead_one(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        for overwrite in (False, True):
            with pytest.raises(FolderError, match=rf"in use by a run that has not ended \(process {holder.pid} on "):
                claim(arguments(tmp_path), overwrite)
    finally:
        holder.kill()
        holder.wait()
    claim(arguments(tmp_path), False)


@pytest.mark.parametrize("make", [run_folder.writable_folder, run_folder.writable_file])
def test_a_path_that_cannot_be_written_is_named(tmp_path, make):
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError, match=r"--output .*there is a file in its place"):
        make(tmp_path / "file" / "x" if make is run_folder.writable_file else tmp_path / "file", "--output")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(FolderError, match="is a folder; name a file in it"):
        run_folder.writable_file(tmp_path, "--output")


def test_secrets_stay_out(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x.py", "--hub_token", "hf_a", "--wandb_key=b", "--max_tokens", "7"])
    claim(arguments(tmp_path), False)
    text = (tmp_path / "run.json").read_text()
    assert "hf_a" not in text and "key=b" not in text and "--max_tokens 7" in text


def test_the_first_rank_decides_for_all(tmp_path):
    launch("tests.trl_ext.common.run_folder_worker", tmp_path, processes=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second and first["run"] == run_folder.run_id(tmp_path / "out")
    assert "holds run" in first["again"]


@pytest.fixture
def told(tmp_path, monkeypatch):
    """What is said when an error ends a run in this folder, by the arguments of its command."""
    monkeypatch.setattr(user_errors, "explainers", [])
    usual = signal.getsignal(signal.SIGTERM)
    resuming.explain_the_end(tmp_path)

    def say(error, *argv):
        monkeypatch.setattr(sys, "argv", ["recipes/x.py", *argv])
        return user_errors.explained(error)

    yield say
    signal.signal(signal.SIGTERM, usual)


FULL = (
    OSError(errno.ENOSPC, "No space left on device"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
)


@pytest.mark.parametrize(
    "error, said, status",
    [
        (KeyboardInterrupt(), "Interrupted", 130),
        (resuming.Terminated(), "SIGTERM", 143),
        *((e, "disk is full", 2) for e in FULL),
        (SafetensorError("I/O error: File too large (os error 27)"), "larger than the file system or `ulimit -f`", 2),
    ],
)
def test_what_ends_a_run_says_how_to_go_on(tmp_path, told, error, said, status):
    text, code = told(error)
    assert said in text and "no complete checkpoint" in text and code == status
    ran(tmp_path, 2)
    (tmp_path / "checkpoint-4").mkdir()  # half written
    text, _ = told(
        error, "--overwrite", "--seed", "1", "--resume_from_checkpoint", "checkpoint-1", "--hub_token", "hf_a"
    )
    end = f"{run_folder._python()} recipes/x.py --seed 1 --hub_token '***' --resume_from_checkpoint latest"
    assert text.endswith(f"{tmp_path / 'checkpoint-2'}; resume from it with: {end}")


@pytest.mark.parametrize("error, said, status", [(KeyboardInterrupt(), "Interrupted", 130), (FULL[0], "full", 2)])
def test_where_training_was_over_there_is_nothing_to_go_on_with(tmp_path, told, error, said, status):
    """As in the evaluation at the end: a resumed run would be refused, for it has no steps left."""
    last = checkpoint(tmp_path, 4)
    (last / "trainer_state.json").write_text(json.dumps({"global_step": 4, "epoch": 0.5, "max_steps": 4}))
    text, code = told(error)
    assert said in text and code == status and "--resume_from_checkpoint" not in text
    assert text.endswith(f"Training had ended: {last} holds the trained model and can be used like final/")


def test_a_finished_run_that_goes_on_with_more_steps_is_not_over(tmp_path, told):
    """Ended before its first checkpoint, whose state would say how many steps there are now."""
    ran(tmp_path, 4)
    state = {"global_step": 4, "epoch": 0.5, "max_steps": 4}
    (tmp_path / "checkpoint-4" / "trainer_state.json").write_text(json.dumps(state))
    assert "Training had ended" in told(KeyboardInterrupt())[0]
    claim(arguments(tmp_path, "latest", max_steps=8), False)
    text, _ = told(KeyboardInterrupt(), "--max_steps", "8")
    assert "Training had ended" not in text
    assert text.endswith(
        "checkpoint-4; resume from it with: " + run_folder.resume_command(["recipes/x.py", "--max_steps", "8"])
    )


def test_the_python_to_resume_with_is_the_one_that_ran(tmp_path, monkeypatch):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    python = tmp_path / ".venv" / "bin" / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    words = ["x.py", "--overwrite", "true", "--resume-from-checkpoint=a", "--seed", "1"]
    assert run_folder.resume_command(words) == f"{python} x.py --seed 1 --resume_from_checkpoint latest"
    monkeypatch.chdir(tmp_path)
    assert run_folder.resume_command(["x.py"]).startswith(".venv/bin/python x.py")
    monkeypatch.setenv("PATH", str(python.parent))  # an activated environment
    assert run_folder.resume_command(["x.py"]).startswith("python x.py")


def test_other_errors_are_said_as_always(told):
    assert told(KeyError("x")) is None


def test_sigterm_is_an_interruption(told):
    with pytest.raises(resuming.Terminated):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


@pytest.mark.parametrize("steps, done, over", [(1, 1, True), (2, 1, False), (-1, 1, False), (-1, 9, True)])
def test_a_run_of_steps_or_of_epochs_is_over(tmp_path, monkeypatch, steps, done, over):
    """Of three steps an epoch, three epochs; one step is few, but no word for epochs."""
    monkeypatch.setattr(resuming, "broken_file", lambda _: None)
    (tmp_path / resuming.STATE_FILE).write_text(json.dumps({"global_step": done, "epoch": done / 3}))
    args = SimpleNamespace(max_steps=steps, num_train_epochs=3)
    if over:
        with pytest.raises(CheckpointError, match="no steps"):
            resuming.check_steps_left(args, tmp_path, False)
    else:
        assert resuming.check_steps_left(args, tmp_path, False) == done
