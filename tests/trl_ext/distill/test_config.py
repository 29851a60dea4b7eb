"""Fields that cannot be trained with are named."""

import pytest

from trl_ext import LogitsDistillConfig, ReasoningDistillConfig

from . import setups


@pytest.mark.parametrize(
    "name, value",
    [
        ("alpha", -0.1),
        ("alpha", 1.1),
        ("alpha", float("nan")),
        ("temperature", 0),
        ("temperature", -1),
        ("temperature", float("inf")),
        ("loss_type", "dft"),
        ("label_smoothing_factor", 0.1),
    ],
)
def test_logits(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        LogitsDistillConfig(**setups.settings(tmp_path, **{name: value}))


@pytest.mark.parametrize(
    "name, value",
    [
        ("tag_weight", -1),
        ("tag_weight", float("nan")),
        ("tags", []),
        ("tags", ["<a>", ""]),
        ("tags", ["<a>", "<a>"]),
        ("tags", "<a>"),
        ("loss_type", "dft"),
        ("label_smoothing_factor", 0.1),
    ],
)
def test_reasoning(tmp_path, name, value):
    with pytest.raises(ValueError, match=f"^{name}="):
        ReasoningDistillConfig(**setups.settings(tmp_path, **{name: value}))


def test_defaults_are_minimind_s_and_sft_may_have_any_loss(tmp_path):
    logits, reasoning = (c(**setups.settings(tmp_path)) for c in (LogitsDistillConfig, ReasoningDistillConfig))
    assert (logits.alpha, logits.temperature, reasoning.tag_weight) == (0.5, 1.5, 10)
    assert reasoning.tags == ["<think>", "</think>", "<answer>", "</answer>"]
    assert LogitsDistillConfig(**setups.settings(tmp_path, alpha=1, loss_type="dft")).loss_type == "dft"
    given = LogitsDistillConfig(**setups.settings(tmp_path, teacher_model_init_kwargs='{"dtype": "float32"}'))
    assert given.teacher_model_init_kwargs == {"dtype": "float32"}
