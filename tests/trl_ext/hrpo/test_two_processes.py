"""Two ranks (DDP on gloo): they end with the same weights, ratio 1 at the first inner step, and resume exactly."""

import json
import os
import socket
import subprocess
import sys

import pytest

from . import setups


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.mark.parametrize(
    "mode, source", [("rollout", "projection"), pytest.param("soft_bptt", "soft_embedding", marks=pytest.mark.slow)]
)
def test_two_ranks_agree(tmp_path, mode, source):
    setups.base_folder(tmp_path)
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port()]
    call += ["-m", "tests.trl_ext.hrpo.two_process_worker", str(tmp_path), mode, source]
    done = subprocess.run(
        call, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False, timeout=250
    )
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["equal_on_both"] and result["resume_equal"]
    assert (
        result["deviation"][0] <= 1e-5 and result["deviation"][2] <= 1e-5
    )  # num_iterations=2: steps 1 and 3 are fresh
    assert all(0 < share <= 1 for share in result["fraction"])
