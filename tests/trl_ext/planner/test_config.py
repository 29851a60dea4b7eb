"""Fields that cannot be meant are named before anything is loaded; the command line's JSON is read."""

import pytest
from trl import TrlParser

from trl_ext import PlannerExecutorConfig

from .setups import TYPES, settings


WRONG = {
    "types": [{"name": "a", "quota": 0}],
    "ordering": "random",
    "multi_token": 1,
    "mode": "write",
    "training": "em",
    "temperature": 0.0,
    "temperature_end": -1.0,
    "commitment_weight": -1,
    "usage_weight": float("inf"),
    "eos_weight": -1,
    "quota_weight": -1,
    "quota_rate": 0,
    "usage_window": 0,
    "word_dropout": 1.0,
    "z_dropout": -0.1,
    "num_candidates": -1,
    "num_beams": -1,
    "e_step_every": 0,
    "max_e_step_every": 0,
    "staleness_threshold": 0,
    "planner_weight": -1,
    "planner_learning_rate": -1,
    "length_curriculum": [8, 4],
    "length_curriculum_nll": -1,
    "length_curriculum_share": 0,
    "target_length": [9.0],
    "packing": True,
    "eval_packing": True,
    "padding_free": True,
    "assistant_only_loss": True,
    "use_liger_kernel": True,
    "completion_only_loss": False,
    "gradient_checkpointing": True,
    "loss_type": "dft",
    "label_smoothing_factor": 0.1,
    "train_sampling_strategy": "group_by_length",
    "dataset_kwargs": {"skip_prepare_dataset": True},
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_fields_are_named(tmp_path, name):
    said = "quota" if name == "types" else name
    with pytest.raises(ValueError, match=said):
        PlannerExecutorConfig(**settings(tmp_path, **{name: WRONG[name]}))


def test_wrong_combinations_are_named(tmp_path):
    for changes, message in (
        ({"types": "[1"}, "types='.1' is not JSON"),
        ({"types": "[1]"}, "is not a ConceptTypeConfig"),
        ({"target_length": [1.0, 1.0, 1.0]}, "one for each of 2 types"),
        ({"target_length": [1.0, 3.0]}, "'b', use more than 0 and at most its quota, 2"),
        ({"gradient_checkpointing": True, "ordering": "parallel"}, "drops the cache"),
        ({"gradient_checkpointing": True, "multi_token": True}, "drops the cache"),
        ({"length_curriculum": []}, "length_curriculum"),
    ):
        with pytest.raises(ValueError, match=message):
            PlannerExecutorConfig(**settings(tmp_path, **changes))


def test_what_is_off_or_in_one_pass_is_not_refused(tmp_path):
    assert PlannerExecutorConfig(**settings(tmp_path, packing=True, use_planner=False)).packing
    for changes in (
        {"training": "hard_em"},
        {"ordering": "parallel", "multi_token": True},
        {"multi_token": True, "types": TYPES[:1]},
    ):
        assert PlannerExecutorConfig(
            **settings(tmp_path, gradient_checkpointing=True, **changes)
        ).gradient_checkpointing


def test_defaults_train_one_type_softly(tmp_path):
    config = PlannerExecutorConfig(str(tmp_path), use_cpu=True, bf16=False)
    (kind,) = config.planner().types
    assert (kind.num_concepts, kind.quota, config.training, config.mode) == (256, 16, "soft", "generate")
    assert config.targets(config.planner()) is None


def test_the_command_line_and_yaml_say_the_same(tmp_path):
    types = '[{"name": "a", "quota": 4}, {"name": "b"}]'
    plain = "--output_dir x --use_cpu --bf16 false --target_length 2 3 --length_curriculum 64 128 --types"
    line = [*plain.split(), types]
    file = tmp_path / "c.yaml"
    file.write_text(
        "output_dir: x\nuse_cpu: true\nbf16: false\ntarget_length: [2, 3]\nlength_curriculum: [64, 128]\n"
        "types:\n- {name: a, quota: 4}\n- {name: b}\n"
    )
    (parsed,), (written,) = (
        TrlParser(PlannerExecutorConfig).parse_args_and_config(args) for args in (line, ["--config", str(file)])
    )
    for config in (parsed, written):
        assert [kind.quota for kind in config.planner().types] == [4, 16] and config.targets(config.planner()) == [2, 3]
        assert config.length_curriculum == [64, 128]
    one = PlannerExecutorConfig(**settings(tmp_path, types='{"quota": 4}', target_length=2))
    assert one.targets(one.planner()) == [2]
