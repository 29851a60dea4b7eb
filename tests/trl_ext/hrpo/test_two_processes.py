"""Two ranks (DDP on gloo): they end with the same weights, ratio 1 at the first inner step, and resume exactly."""

import json

import pytest

from tests.marks import slow
from tests.processes import launch

from . import setups


@pytest.mark.parametrize("mode, source", [("rollout", "projection"), slow("soft_bptt", "soft_embedding")])
def test_two_ranks_agree(tmp_path, mode, source):
    setups.base_folder(tmp_path)
    launch("tests.trl_ext.hrpo.two_process_worker", tmp_path, mode, source, processes=2)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["equal_on_both"] and result["resume_equal"]
    assert (
        result["deviation"][0] <= 1e-5 and result["deviation"][2] <= 1e-5
    )  # num_iterations=2: steps 1 and 3 are fresh
    assert all(0 < share <= 1 for share in result["fraction"])
