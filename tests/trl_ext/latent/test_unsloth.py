"""Where Unsloth was imported: its SFT trainer serves, its fast forwards are refused."""

import importlib.util

import pytest

from tests.unsloth_scripts import run

from . import setups


pytestmark = [
    pytest.mark.unsloth,
    pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="unsloth is not installed"),
]


def test_losses_on_unsloths_trainer_equal_those_on_trls(tmp_path):
    """The first step's, to 1e-6; later ones see other rows, since the two shuffle differently."""
    found = run("latent")
    assert found["parent"] == "UnslothSFTTrainer"
    trainer = setups.trainer(tmp_path, family="qwen2", **setups.CASES["kv"])
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {name for name in first if name.startswith("loss")} == found["losses"].keys()
    for name, value in found["losses"].items():
        assert value == pytest.approx(first[name], abs=1e-6), name


def test_models_with_unsloths_fast_forwards_are_refused():
    assert "AutoModelForCausalLM" in run("latent")["refusal"]
