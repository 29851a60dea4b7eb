"""Two ranks (DDP on gloo) with half the rows each give the losses, state and weights of one with all of them."""

import json

import pytest
import torch

from tests.processes import launch

from .two_process_worker import CASES


def start(folder, processes):
    folder.mkdir()
    launch("tests.trl_ext.planner.two_process_worker", folder, 4 // processes, processes=processes)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of all cases, by one process and by two."""
    return [start(tmp_path_factory.mktemp("runs") / str(n), n) for n in (1, 2)]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_two_processes_are_one(folders, case):
    """Every term of every step to 1e-5, weights and what is kept beside them to 1e-5; ranks alike bit for bit, though in
    soft training they run different numbers of planning passes."""
    one, two = (
        (json.loads((f / case / "result.json").read_text()), torch.load(f / case / "weights.pt", weights_only=True))
        for f in folders
    )
    assert two[0]["same"] and len(one[0]["steps"]) == len(two[0]["steps"]) == 4
    if case != "hard_em":
        ours, theirs = two[0]["passes"]
        assert ours != theirs, "the case has no teeth"
    for alone, both in zip(one[0]["steps"], two[0]["steps"], strict=True):
        assert alone.keys() == both.keys()
        for name in alone:
            assert both[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5), name
    for name in ("eval_loss/executor", "eval_nll_null", "eval_planner/expected_length_a"):
        assert two[0]["eval"][name] == pytest.approx(one[0]["eval"][name], rel=1e-5), name
    for name in ("weights", "state"):
        a, b = one[1][name], two[1][name]
        assert (a - b).masked_fill(a == b, 0).abs().max() <= 1e-5, name  # infinities are alike
