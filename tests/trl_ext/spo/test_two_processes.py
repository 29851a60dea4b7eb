"""Two ranks (DDP on gloo) with half of each rollout are one with all of it: draws, tracker, D, losses, weights."""

import json
import os
import subprocess
import sys

import pytest
import torch

from tests.trl_ext.hrpo.test_two_processes import free_port
from tests.trl_ext.spo import setups


def run(folder, processes, tracker):
    folder.mkdir()
    setups.base_folder(folder)  # before two processes make it at once
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", free_port()]
    command += ["-m", "tests.trl_ext.spo.two_process_worker", str(folder), str(4 // processes), tracker]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "result.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.parametrize("tracker", ["prompt", pytest.param("global", marks=pytest.mark.slow)])
def test_two_processes_are_one(tmp_path, tracker):
    """Rewards of the drawn prompts exactly; tracker, D and losses to 1e-5and weights to 1e-5; resumed, to the bit."""
    (one, first), (two, second) = (run(tmp_path / str(n), n, tracker) for n in (1, 2))
    assert one["rewards"] == two["rewards"] and len(one["rewards"]) == 6
    assert two["a"] == pytest.approx(one["a"], abs=1e-5)
    assert two["divergence"] == pytest.approx(one["divergence"], abs=1e-5) and len(one["divergence"]) >= 3
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert (first - second).abs().max() <= 1e-5
    assert one["resume_equal"] and two["resume_equal"]
