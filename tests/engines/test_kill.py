"""kill -9 of one of two processes of a recipe, as torchrun and accelerate start them."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from tests.processes import ROOT


FLAGS = [
    "--sft_steps",
    "10",
    "--max_steps",
    "40",
    "--eval_size",
    "8",
    "--eval_every",
    "0",
    "--dry_run_rows",
    "4",
    "--max_completion_length",
    "8",
    "--per_device_train_batch_size",
    "8",
    "--logging_steps",
    "1",
    "--save_steps",
    "1",
    "--use_cpu",
    "true",
]


def start(folder, *flags):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [str(ROOT / "recipes" / "hrpo_gsm8k.py"), *FLAGS, "--output_dir", "out", "--cache_dir", "cache", *flags]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    with (folder / "log").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT)


def ranks(launcher):
    """The two processes that train, by rank."""
    found = {}
    for child in psutil.Process(launcher.pid).children():
        rank = child.environ().get("RANK")
        if rank is not None:
            found[int(rank)] = child
    return found


@pytest.mark.engines
def test_the_other_ends_within_a_minute_and_the_run_goes_on(tmp_path):
    launcher = start(tmp_path)
    checkpoint, limit = tmp_path / "out" / "checkpoint-3" / "trainer_state.json", time.monotonic() + 200
    while not checkpoint.exists():
        assert launcher.poll() is None and time.monotonic() < limit, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.1)
    ranks(launcher)[1].send_signal(signal.SIGKILL)
    begun = time.monotonic()
    assert launcher.wait(timeout=60) != 0
    assert time.monotonic() - begun < 60
    said = (tmp_path / "log").read_text()
    assert "Another process of this run has ended" in said or "Ended by SIGTERM" in said
    assert "resume from it with: the launch command that started the run" in said
    again = start(tmp_path, "--resume_from_checkpoint", "latest", "--max_steps", "6")
    assert again.wait(timeout=200) == 0, (tmp_path / "log").read_text()[-3000:]
    assert (tmp_path / "out" / "final").is_dir()
