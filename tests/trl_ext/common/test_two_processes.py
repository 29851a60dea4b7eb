"""Two ranks (DDP on gloo) with half the rows each give the losses, deviations and weights of one with all of them."""

import json

import pytest
import torch

from tests.marks import slow
from tests.processes import launch


def start(method, folder, case, processes):
    folder.mkdir()
    launch("tests.trl_ext.common.two_process_worker", method, folder, case, 4 // processes, processes=processes)
    if case == "codebook":
        return torch.load(folder / "weights.pt", weights_only=True)
    return json.loads((folder / "result.json").read_text()), torch.load(folder / "weights.pt", weights_only=True)


@pytest.mark.parametrize(
    "method,case,term",
    [
        ("latent", "sequential", "loss/codi"),
        ("latent", "staged", "loss/latent_ce"),
        ("latent", "sequential, written", "loss/step_decoder"),
        slow("latent", "kv", "loss/kv"),
        ("kv", "default", "kv/attn"),
        slow("kv", "note", "kv/k"),
        slow("concept", "stable", "loss/ratio"),
        slow("concept", "autoregressive", "concept/ratio"),
    ],
)
def test_two_processes_are_one(tmp_path, method, case, term):
    """Every term of every step to 1e-5, the weights to 1e-4 of the largest change (AdamW divides by small numbers)."""
    one, two = (start(method, tmp_path / str(n), case, n) for n in (1, 2))
    assert len(one[0]["steps"]) == len(two[0]["steps"]) == 4
    for alone, both in zip(one[0]["steps"], two[0]["steps"], strict=True):
        assert alone.keys() == both.keys() and term in both
        for name in alone:
            assert both[name] == pytest.approx(alone[name], rel=1e-5, abs=1e-5), name
    assert two[0]["eval"] == pytest.approx(one[0]["eval"], rel=1e-5)
    assert (one[1] - two[1]).abs().max() <= 1e-4


def test_codewords_are_those_of_the_first_process(tmp_path):
    """k-means went elsewhere in the second; bit for bit."""
    first, second = start("concept", tmp_path / "2", "codebook", 2)
    assert first.abs().max() > 0 and torch.equal(first, second)
