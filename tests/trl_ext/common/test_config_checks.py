"""Sizes of nothing are named by every configuration of ours, also where no recipe has parsed them."""

import inspect
import re
from types import SimpleNamespace

import pytest
import trl

import trl_ext
from trl_ext.cli.recipe import RecipeArguments
from trl_ext.common.config_checks import RL_CHOICES, check_values
from trl_ext.concept import recipe as concept
from trl_ext.latent import recipe as latent
from trl_ext.minimind.rl import RLArguments
from trl_ext.minimind.stage import DataStageArguments


CONFIGS = [name for name in trl_ext.__all__ if name.endswith("Config")]
RL = ("HRPOConfig", "LatentGRPOConfig", "PPOConfig", "SPOConfig")


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_named_before_anything_is_divided_by_it(name, tmp_path):
    wrong = {"per_device_train_batch_size": 0, "gradient_accumulation_steps": -1, "learning_rate": float("nan")}
    wrong |= {"num_generations": 0, "steps_per_generation": 0, "num_iterations": 0} if name in RL else {"max_length": 0}
    for field, value in wrong.items():
        with pytest.raises(ValueError, match=rf"{field}={value}: must be at least "):
            getattr(trl_ext, name)(str(tmp_path), use_cpu=True, bf16=False, **{field: value})


SMALLEST = [
    ("ConceptConfig", {"n_shallow": 1, "n_middle": 1, "n_deep": 1}),
    ("PlannerExecutorConfig", {"num_candidates": 0, "num_beams": 1, "e_step_every": 1, "max_e_step_every": 1}),
    ("PlannerExecutorConfig", {"num_candidates": 1, "num_beams": 0}),
    ("PlannerExecutorConfig", dict.fromkeys(("usage_weight", "eos_weight", "planner_weight", "entropy_weight"), 0.0)),
    ("PlannerExecutorConfig", dict.fromkeys(("word_dropout", "z_dropout", "forced_share"), 0.0)),
]


@pytest.mark.parametrize("name, fields", SMALLEST)
def test_the_smallest_value_is_allowed(name, fields, tmp_path):
    made = getattr(trl_ext, name)(str(tmp_path), use_cpu=True, bf16=False, **fields)
    assert {field: getattr(made, field) for field in fields} == fields


FLAGS = [
    (RecipeArguments, {"lora_r": 0, "lora_alpha": 1, "lora_dropout": 0.0}),
    (RecipeArguments, {"train_size": 1, "eval_size": 1, "eval_every": 0, "eval_batch": 1}),
    (latent.ScriptArguments, {"max_new_tokens": 1, "sft_steps": 1}),
    (concept.ScriptArguments, {"max_new_tokens": 1, "base_steps": 1}),
    (RLArguments, {"max_generated_tokens": 1}),
    (DataStageArguments, {"train_size": 1, "eval_size": 1}),
]


@pytest.mark.parametrize("arguments, fields", FLAGS)
def test_the_smallest_flags_of_a_recipe_are_allowed(arguments, fields):
    made = arguments(**fields)
    assert {field: getattr(made, field) for field in fields} == fields
    for field, value in fields.items():
        with pytest.raises(ValueError, match=f"{field}={value - 1}"):
            arguments(**{field: value - 1})


def test_text_that_begins_with_a_brace_is_an_object_only_where_one_can_be():
    """As transformers reads its own fields: the name of a file that holds the object stays a name."""
    fields = {"_VALID_DICT_FIELDS": ["deepspeed"], "run_name": "{mine"}
    check_values(SimpleNamespace(deepspeed="zero.json", **fields))
    with pytest.raises(ValueError, match=r"^deepspeed='\{zero': a JSON object"):
        check_values(SimpleNamespace(deepspeed="{zero", **fields))


WEIGHTS = {
    "KAVAConfig": ["w_student", "w_teacher", "w_codi", "w_kv"],
    "ConceptConfig": ["ratio_weight", "usage_weight"],
    "PlannerExecutorConfig": [
        "commitment_weight",
        "usage_weight",
        "eos_weight",
        "quota_weight",
        "planner_weight",
        "signal_weight",
        "entropy_weight",
        "beam_diversity",
    ],
    "KVDistillConfig": ["lambda_kv"],
    "KAVALoss": ["alpha1_codi", "alpha2_kv", "teacher_ce_weight"],
}
RATES = {
    "ConceptConfig": ["concept_learning_rate"],
    "PlannerExecutorConfig": ["planner_learning_rate"],
    "KVDistillConfig": ["aligner_learning_rate"],
    "PPOConfig": ["critic_learning_rate"],
}
POSITIVE = {
    "ConceptConfig": ["temperature", "temperature_end"],
    "PlannerExecutorConfig": ["temperature", "temperature_end", "quota_rate", "usage_window", "staleness_threshold"],
    "LogitsDistillConfig": ["temperature"],
    "HRPOConfig": ["temperature", "repetition_penalty"],
}


def outside(fields, values):
    return [(name, field, value) for name, each in fields.items() for field in each for value in values]


@pytest.mark.parametrize(
    "name, field, value",
    [
        *outside(WEIGHTS, (-0.1, float("inf"), float("nan"), "0.5", None)),
        *outside(RATES, (-0.1, float("inf"), float("nan"))),
        *outside(POSITIVE, (0.0, -1.0, float("inf"))),
        *outside({"ConceptConfig": ["temperature_end"]}, ("0.5",)),
        *outside({"HRPOConfig": ["top_p", "min_p"]}, (-0.1, 1.1)),
        *outside({"HRPOConfig": ["epsilon", "epsilon_high", "beta"]}, (-0.1, float("inf"), float("nan"))),
    ],
)
def test_a_number_out_of_its_range_is_named(name, field, value, tmp_path):
    with pytest.raises(ValueError, match=re.escape(f"{field}={value!r}: ")):
        if name == "KAVALoss":
            trl_ext.KAVALoss(**{field: value})
        else:
            getattr(trl_ext, name)(str(tmp_path), use_cpu=True, bf16=False, **{field: value})


@pytest.mark.parametrize("field", ["loss_type", "importance_sampling_level", "scale_rewards"])
@pytest.mark.parametrize("name", RL)
def test_words_that_trl_reads_after_the_first_rollout_are_named_before_it(name, field, tmp_path):
    with pytest.raises(ValueError, match=f"{field}='foo': choose one of "):
        getattr(trl_ext, name)(str(tmp_path), use_cpu=True, bf16=False, **{field: "foo"})


def test_they_are_the_words_that_trl_reads():
    source = inspect.getsource(trl.GRPOTrainer)
    for field, choices in RL_CHOICES.items():
        for choice in choices:
            assert isinstance(choice, bool) or f'"{choice}"' in source, (field, choice)
    read = set(re.findall(r'self\.loss_type == "(\w+)"', source))
    for words in re.findall(r"self\.loss_type in \[([^]]*)\]", source):
        read |= set(re.findall(r'"(\w+)"', words))
    assert read == set(RL_CHOICES["loss_type"])
