"""Two ranks (DDP on gloo) with half of each rollout are one with all of it: draws, tracker, D, losses, weights."""

import json

import pytest
import torch

from tests.marks import slow
from tests.processes import launch
from tests.trl_ext.spo import setups


def run(folder, processes, tracker):
    folder.mkdir()
    setups.base_folder(folder)  # before two processes make it at once
    launch("tests.trl_ext.spo.two_process_worker", folder, 4 // processes, tracker, processes=processes)
    return json.loads((folder / "result.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.parametrize("tracker", ["prompt", slow("global")])
def test_two_processes_are_one(tmp_path, tracker):
    """Rewards of the drawn prompts exactly; tracker, D and losses to 1e-5, and weights to 1e-5; resumed, to the bit."""
    (one, first), (two, second) = (run(tmp_path / str(n), n, tracker) for n in (1, 2))
    assert one["rewards"] == two["rewards"] and len(one["rewards"]) == 6
    assert two["a"] == pytest.approx(one["a"], abs=1e-5)
    assert two["divergence"] == pytest.approx(one["divergence"], abs=1e-5) and len(one["divergence"]) >= 3
    assert two["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert (first - second).abs().max() <= 1e-5
    assert one["resume_equal"] and two["resume_equal"]
