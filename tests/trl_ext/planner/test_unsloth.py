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
# The latter draws nothing: its one candidate is the greedy plan
TRAININGS = {
    "soft": {"target_length": 1.5},
    "hard_em": {"training": "hard_em", "num_candidates": 0, "z_dropout": 0.0},
}


@pytest.mark.parametrize("case", TRAININGS)
def test_unsloths_trainer_trains_as_trls_does(tmp_path, case):
    """The same parameters move; of the first step the same figures are logged, to 1e-5 relative where no draw enters."""
    found = run("planner")
    assert found["parent"] == "UnslothSFTTrainer"
    trainer = setups.trainer(tmp_path, peft=True, **TRAININGS[case])
    before = setups.weights(trainer)
    trainer.train()
    after = setups.weights(trainer)
    assert found[case]["trained"] == sorted(n for n in after if not torch.equal(after[n], before[n]))
    assert any("lora_B" in name for name in found[case]["trained"])
    assert any("unified_head" in name for name in found[case]["trained"])
    first = next(entry for entry in trainer.state.log_history if "loss/executor" in entry)
    names = {name for name in first if name.startswith(("planner/", "loss", "em/"))}
    assert names == found[case]["losses"].keys()
    for name in sorted(names) if case == "hard_em" else ["planner/temperature"]:
        assert found[case]["losses"][name] == pytest.approx(first[name], rel=1e-5, abs=1e-6), name


def test_models_with_unsloths_fast_forwards_and_names_are_refused():
    found = run("planner")
    assert "Unsloth's fast forwards" in found["fast"]
    assert "takes no model names" in found["name"]
