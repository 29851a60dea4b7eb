"""kill -9 at ten random moments, resume each time: the final weights are those of the run that was left alone."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from ..hrpo import setups


def start(method, folder):
    """Says `step N` at the beginning of each."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "tests.trl_ext.common.kill_worker", method, str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=env,
    )


METHODS = ["hrpo", "latent", "latent_staged", "latent_written", "latent_grpo", "kv", "concept", "planner", "planner_em"]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_ten_kills_change_nothing(tmp_path, method):
    alone, killed = tmp_path / "alone", tmp_path / "killed"
    for folder in (alone, killed):
        folder.mkdir()
        if method == "hrpo":
            setups.base_folder(folder)
    whole = start(method, alone)
    times = [time.monotonic() for line in whole.stdout if line.startswith("step")]
    assert whole.wait() == 0
    rng, kills, steps, usual = random.Random(7), 0, [], (times[-1] - times[0]) / (len(times) - 1)
    while kills < 10:
        worker = start(method, killed)
        begun = (int(line.split()[1]) for line in worker.stdout if line.startswith("step"))
        steps.append(next(begun, None))
        assert steps[-1] is not None, "the worker died by itself"
        after = rng.uniform(0, 4)  # steps: so many begin, then a part of one passes, whatever else the machine does
        for _ in range(int(after)):
            next(begun, None)
        time.sleep(after % 1 * usual)
        if worker.poll() is not None:
            break
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        kills += 1
    assert kills == 10, f"the run ended after {kills} kills; started at steps {steps}"
    assert steps == sorted(steps) and steps[-1] > 0
    assert start(method, killed).wait() == 0
    files = ["adapter_model.safetensors", *(["aligner/aligner.safetensors"] if method == "kv" else [])]
    for file in files:
        expected, found = (load_file(folder / "final" / file) for folder in (alone, killed))
        assert expected.keys() == found.keys() and all(torch.equal(expected[k], found[k]) for k in expected)
