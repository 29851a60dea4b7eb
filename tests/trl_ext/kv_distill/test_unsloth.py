"""Where Unsloth was imported: its SFT trainer serves, its fast forwards are refused."""

import importlib.util

import pytest
import torch

from tests.unsloth_scripts import run

from . import setups


pytestmark = [
    pytest.mark.unsloth,
    pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="unsloth is not installed"),
]


def test_unsloths_trainer_trains_as_trls_does(tmp_path):
    """The same parameters move (left to itself it would ignore `peft_config`); every figure of the first step to 1e-5
    relative. Later ones see other rows, since the two shuffle differently."""
    found = run("kv_distill")
    assert found["parent"] == "UnslothSFTTrainer"
    trainer = setups.trainer(tmp_path, peft=True, family="qwen2")
    before = {n: p.detach().clone() for n, p in trainer._named_trained().items()}
    after = setups.trained(trainer)
    assert found["trained"] == sorted(n for n in after if not torch.equal(after[n], before[n]))
    assert any("lora_B" in name for name in found["trained"]) and any("head_map" in name for name in found["trained"])
    first = next(entry for entry in trainer.state.log_history if "kv/loss" in entry)
    assert {name for name in first if name.startswith(("kv/", "loss"))} == found["losses"].keys()
    for name, value in found["losses"].items():
        assert value == pytest.approx(first[name], rel=1e-5), name


def test_models_with_unsloths_fast_forwards_and_names_are_refused():
    found = run("kv_distill")
    assert all("Unsloth's fast forwards" in refusal for refusal in found["fast"])
    assert "takes no model names" in found["name"]


@pytest.mark.slow
def test_layers_that_unsloth_compiles_are_looked_into_all_the_same(tmp_path):
    """With gradient checkpointing, whose recomputation runs after the look; every figure of the first step to 1e-4."""
    found = run("kv_compiled")
    assert found["wrapped"] == ["Qwen2DecoderLayer"] and found["off"] and found["reverted"]
    trainer = setups.trainer(tmp_path, peft=True, family="qwen2", gradient_checkpointing=True)
    setups.trained(trainer)
    first = next(entry for entry in trainer.state.log_history if "kv/loss" in entry)
    for name, value in found["losses"].items():
        assert value == pytest.approx(first[name], rel=1e-4), name
