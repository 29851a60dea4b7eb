"""Where Unsloth was imported: its SFT trainer serves, its fast forwards are refused."""

import importlib.util

import pytest

from tests.unsloth_scripts import run

from . import setups


pytestmark = [
    pytest.mark.unsloth,
    pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="unsloth is not installed"),
]


def test_unsloths_trainer_trains_as_trls_does(tmp_path):
    """The same parameters move (left to itself it would ignore `peft_config`); losses of the first step to 1e-6. Later ones
    see other rows, since the two shuffle differently."""
    found = run("latent")
    assert found["parent"] == "UnslothSFTTrainer"
    trainer = setups.trainer(tmp_path, family="qwen2", **setups.CASES["kv"])
    moved = setups.trained(trainer)
    assert any("lora_" in name for name in moved) and found["trained"] == moved
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert {name for name in first if name.startswith("loss")} == found["losses"].keys()
    for name, value in found["losses"].items():
        assert value == pytest.approx(first[name], abs=1e-6), name


def test_models_with_unsloths_fast_forwards_are_refused():
    assert all("AutoModelForCausalLM" in refusal for refusal in run("latent")["refusals"])
