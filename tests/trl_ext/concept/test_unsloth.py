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
    """The same parameters move (left to itself it would ignore `peft_config`); the figures of the first step are
    TRL's, to 1e-5 relative those that no draw enters, since the two shuffle alike until then."""
    found = run("concept")
    assert found["parent"] == "UnslothSFTTrainer"
    trainer = setups.trainer(tmp_path, peft=True, family="qwen2", **setups.CASES["autoregressive"])
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    after = setups.trained(trainer)
    assert found["trained"] == sorted(n for n in after if not torch.equal(after[n], before[n]))
    assert any("lora_B" in name for name in found["trained"]) and any(
        "concept_head" in name for name in found["trained"]
    )
    first = next(entry for entry in trainer.state.log_history if "loss/ce" in entry)
    assert {name for name in first if name.startswith(("concept/", "loss"))} == found["losses"].keys()
    for name in ("concept/ratio", "concept/probability", "loss/ratio", "loss/usage"):
        assert found["losses"][name] == pytest.approx(first[name], rel=1e-5), name
    assert found["losses"]["loss/ce"] == pytest.approx(first["loss/ce"], rel=0.05)


def test_models_with_unsloths_fast_forwards_and_names_are_refused():
    found = run("concept")
    assert "Unsloth's fast forwards" in found["fast"]
    assert "takes no model names" in found["name"]
