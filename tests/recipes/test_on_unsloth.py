"""The GPU's configuration of the recipe, run through Unsloth's own forwards, loss and trainer."""

import importlib.util

import pytest

from tests.unsloth_scripts import run


@pytest.mark.unsloth
@pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="unsloth is not installed")
def test_the_recipe_takes_unsloths_trainer():
    found = run("recipe")
    assert found["trainer"] == "UnslothHRPOMixin"
    assert found["summary"]["steps"] == 2 and found["summary"]["n_eval"] == 4
    assert list(found["summary"]["accuracy_curve"]) == ["0", "1", "2"]
    assert found["checkpoints"] == ["checkpoint-1", "checkpoint-2"]
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(found["files"])
    assert not any(name.endswith((".bin", ".pt", ".pth", ".pkl")) for name in found["files"])
