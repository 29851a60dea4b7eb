"""Each feature of TRL's trainers works in ours, or is refused by name before training."""

import math

import pytest
import torch
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import is_liger_kernel_available

from tests.marks import slow
from tests.trl_ext.hrpo import setups as hrpo

from .features import FEATURES, ITERABLE, LIGER, REFUSED, chats, messages, own_rows, rendered, texts
from .trainers import CASES


def losses(trainer):
    trainer.train()
    found = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(found) == 2 and all(math.isfinite(loss) for loss in found)
    return found


def norms(trainer):
    return [entry["grad_norm"] for entry in trainer.state.log_history if "loss" in entry]


def of(feature, *, refused):
    for case in CASES:
        if case.parent in feature.parents and (feature.name in REFUSED[case.name]) is refused:
            yield case


def params(refused):
    found = []
    for feature in FEATURES:
        for case in of(feature, refused=refused):
            shown_elsewhere = feature.name == LIGER or (case.parent == "GRPOTrainer" and feature.name == ITERABLE)
            if refused or not shown_elsewhere:
                make = slow if feature.slow else pytest.param
                found.append(make(case, feature))
    return found


def name_of(value):
    return value.name.strip("`")


@pytest.mark.parametrize("case, feature", params(True), ids=name_of)
def test_refused_by_name(tmp_path, case, feature):
    with pytest.raises(ValueError) as error:
        case.make(tmp_path, max_steps=2, **feature.fields, **feature.keywords(case))
    assert str(error.value).startswith(REFUSED[case.name][feature.name])


@pytest.mark.parametrize("case, feature", params(False), ids=name_of)
def test_works(tmp_path, case, feature):
    """As `Feature.shown` says; 1e-6 relative where losses are equal, 1e-4 for a compiled model."""

    def run(**given):
        return losses(case.make(tmp_path, max_steps=2, **given))

    torch._dynamo.reset()
    trainer = case.make(tmp_path, max_steps=2, **feature.fields, **feature.keywords(case))
    found = losses(trainer)
    plain = {"train_dataset": own_rows(case)}
    match feature.name.strip("`"):
        case "label_smoothing_factor" | "completion_only_loss=False":
            assert all(a != b for a, b in zip(found, run(**plain), strict=True))
        case "NEFTune (`neftune_noise_alpha`)":  # a policy loss is the mean advantage, whatever the probabilities
            without = case.make(tmp_path, max_steps=2, **plain)
            losses(without)
            assert all(a != pytest.approx(b, rel=1e-3) for a, b in zip(norms(trainer), norms(without), strict=True))
        case "assistant_only_loss":
            assert found == pytest.approx(run(**chats(case)), rel=1e-6)
            assert found != pytest.approx(run(**messages(case)), rel=1e-3)
        case "formatting_func":
            assert found == pytest.approx(run(**texts(case)), rel=1e-6)
        case "iterable datasets":
            assert found == pytest.approx(run(**plain, train_sampling_strategy="sequential"), rel=1e-6)
        case "conversational rows":
            assert found == pytest.approx(run(**rendered(case)), rel=1e-6)
        case "packing":
            assert 0 < len(trainer.train_dataset) < len(case.rows)
        case 'train_sampling_strategy="group_by_length"':
            assert isinstance(trainer._get_train_sampler(), LengthGroupedSampler)
        case "torch_compile":
            assert trainer.model_wrapped is not trainer.model or hasattr(trainer.model, "_orig_mod")
            assert found == pytest.approx(run(**plain), rel=1e-4)
        case other:
            pytest.fail(f"nothing shows that {other} works")


@pytest.mark.parametrize(
    "case", [case for case in CASES if case.name in ("HRPOTrainer", "LatentGRPOTrainer", "PPOTrainer")], ids=name_of
)
def test_rollouts_of_an_iterable_dataset_are_of_its_rows_in_order(tmp_path, case):
    """Each prompt is seen as often as it is sampled; no row is skipped."""
    seen = []

    def reward(prompts, completions, **_):
        seen.extend(prompts)
        return [0.1 * i for i in range(len(completions))]

    rows = {"train_dataset": hrpo.prompts().to_iterable_dataset(), "shuffle_dataset": False}
    losses(case.make(tmp_path, max_steps=2, reward_funcs=reward, **rows))
    once = [prompt for i, prompt in enumerate(seen) if i == 0 or prompt != seen[i - 1]]
    assert len(once) >= 4 and once == [row["prompt"] for row in hrpo.prompts()][: len(once)]


@pytest.mark.skipif(is_liger_kernel_available(), reason="liger-kernel is installed")
@pytest.mark.parametrize("case", [case for case in CASES if LIGER not in REFUSED[case.name]], ids=name_of)
def test_liger_reaches_trl(tmp_path, case):
    """Nothing of ours refuses it, so what is said is TRL's sentence about the missing package."""
    with pytest.raises(ImportError, match=r"liger-kernel >= .* is not available"):
        case.make(tmp_path, use_liger_kernel=True).train()


def test_the_table_names_only_what_there_is():
    names = {feature.name: feature.parents for feature in FEATURES}
    for case in CASES:
        assert all(case.parent in names[name] for name in REFUSED[case.name])
    assert REFUSED.keys() == {case.name for case in CASES}
