"""HRPOTrainer on the trainer that Unsloth generates: the same losses as on stock TRL, every mode, resume, refusals."""

import functools
import importlib.util
import re

import pytest

from tests.marks import slow
from tests.unsloth_scripts import run
from tests.unsloth_scripts.hrpo_losses import MODES, RUNS


pytestmark = [
    pytest.mark.unsloth,
    pytest.mark.skipif(importlib.util.find_spec("unsloth") is None, reason="unsloth is not installed"),
]
RATIO = 5e-5  # fp32, log-probs of a random model at temperature 0.5: some below -30


@functools.cache
def found() -> dict:
    return run("hrpo")


def test_the_parent_is_unsloths():
    assert found()["parent"] == "UnslothGRPOTrainer.UnslothGRPOTrainer"
    assert found()["mro"][:3] == ["HRPOTrainer", "UnslothHRPOMixin", "HRPOMixin"]


@pytest.mark.parametrize("case", [f"{source} {mode}" for source, mode in RUNS])
@pytest.mark.parametrize("way_in", ["hrpo", slow("cpu_backend")])
def test_losses_equal_those_on_stock_trl(way_in, case):
    stock = run("hrpo_losses")
    other = found()["losses"] if way_in == "hrpo" else run("cpu_backend")
    assert stock["parent"] == "trl.trainer.grpo_trainer"
    a, b = stock[case], other[case]
    assert a["completions"] == b["completions"]
    assert len(a["loss"]) == 4
    for name in ("loss", "grad_norm/policy", "thinking/projection_grad_norm", "thinking/embeds_ratio"):
        if "soft_embedding" in case and "projection" in name:
            continue
        assert b[name] == pytest.approx(a[name], abs=1e-5), name  # seen: 4e-7


@pytest.mark.slow
def test_without_a_gpu_unsloth_is_its_cpu_backend():
    report = run("cpu_backend")
    assert report["cpu_backend"] is True and report["parent"] == "trl.trainer.grpo_trainer"


@pytest.mark.parametrize("case", [f"{source} {mode}" for source, mode in MODES])
def test_modes(case):
    report = found()["modes"][case]
    assert report["finite"]
    if "two_pass" not in case:  # biased by construction
        assert max(report["ratio"]) <= RATIO
    trains_projection = case.startswith("projection")
    assert report["moved"] == {"lora_B": True, "gate_r": True, "Lambda": True, "projection": trains_projection}
    assert set(report["saved"]) >= {"thinking_residual_gate_r", "thinking_residual_gate_i", "thinking_residual_Lambda"}
    assert report["thinking"]["thinking_source"] == case.split()[0]
    assert 0 < report["fraction"] < 1
    a, b = report["ratios"]
    assert 0 < a < 1 and 0 < b < 1


def test_the_ratio_is_far_from_1_when_training_does_not_get_the_states():
    assert found()["blind"] > 0.1


def test_inner_iterations_accumulation_and_mini_batches():
    ratio = found()["iterations"]["ratio"]  # two generations, two steps each
    assert ratio[0] <= RATIO and ratio[2] <= RATIO and ratio[1] > 0.01
    assert found()["iterations"]["kl"] > 0
    assert found()["accumulation"]["ratio"][0] <= RATIO
    assert found()["mini_batch"]["losses"] == found()["modes"]["projection rollout"]["losses"]


def test_resume_equals_the_run_that_was_never_stopped():
    report = found()["resumed"]
    assert report["parameters 2"] == report["parameters 3"] == 0.0 and report["losses 2"] and report["losses 3"]
    assert set(report["files"]) <= {".safetensors", ".json", ".md", ".jinja"}


def test_feature_off_is_the_parent_bit_for_bit():
    assert found()["feature_off"] == {"losses": True, "parameters": True, "n": 3}


def test_config_keeps_trls_defaults_and_both_sets_of_checks():
    report = found()["config"]
    assert report["parsed"] and report["by_trl"] and report["pickled"] and report["is_unsloths"]
    assert report["values"] | {"learning_rate": 1e-6, "loss_type": "dapo", "seed": 42, "beta": 0.0} == report["values"]
    assert report["json"] == ["rollout", 5e-5, None]
    assert "recompute='nonsense'" in report["checks"]["ours"]
    assert "temperature" in report["checks"]["unsloths"] and "mini batch" in report["checks"]["mini_batch"]
    assert "no_such_field" in report["checks"]["unknown"]


@pytest.mark.parametrize(
    "case, message",
    [
        ("stale", "import unsloth first"),
        ("bypassed", "compute_loss is bypassed"),
        ("training step", "did not call HRPOTrainer.compute_loss"),
        ("path", "FastThinkingModel.from_pretrained"),
        ("not unsloth's", "Qwen3ForCausalLM.*FastThinkingModel.from_pretrained"),
    ],
)
def test_nothing_is_bypassed_in_silence(case, message):
    assert re.search(message, found()["refusals"][case])


def test_whose_reference_is_the_bare_base_model_is_told_so():
    report = found()["references"]
    assert report["new"] == report["free"] == []
    assert len(report["trained"]) == 1 and "beta=0.05 pulls it to the base model" in report["trained"][0]


def test_a_plain_model_and_a_peft_config():
    report = found()["plain_model"]
    assert report["ratio"] <= RATIO and report["only_adapter"] and report["thinking"] >= 6


def test_evaluation():
    report = found()["evaluated"]
    assert report["eval_thinking/ratio_deviation"] <= RATIO and 0 < report["eval_thinking/fraction"] < 1
