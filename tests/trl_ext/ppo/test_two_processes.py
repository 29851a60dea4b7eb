"""Two ranks (DDP on gloo) with half of each rollout are one with all of it, dropped steps included."""

import json

import pytest
import torch

from tests.processes import launch


def run(folder, processes):
    folder.mkdir()
    launch("tests.trl_ext.ppo.two_process_worker", folder, 4 // processes, processes=processes)
    return json.loads((folder / "result.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


def test_two_processes_are_one(tmp_path):
    """Everything that is logged to 1e-4, weights of policy and critic to 1e-5; on both ranks the same bits."""
    (one, first), (two, second) = (run(tmp_path / str(n), n) for n in (1, 2))
    assert one["stopped"] == two["stopped"] and set(one["stopped"]) == {0.0, 1.0}
    assert one["steps"] and one["steps"].keys() == two["steps"].keys()
    for name, values in one["steps"].items():
        assert two["steps"][name] == pytest.approx(values, rel=1e-4, abs=1e-5), name
    assert (first - second).abs().max() <= 1e-5
    assert (first - first[0]).abs().max() > 0
    assert two["equal_on_both"] and one["resume_equal"] and two["resume_equal"]
