"""What every method promises, asked of its record: trainers are drop-ins, and configurations explain their fields."""

import dataclasses
import importlib
import inspect

import pytest
import trl

import trl_ext
import unsloth_ext
from trl_ext.common.checkpointing import SafeCheckpointMixin
from trl_ext.common.method import training_methods
from unsloth_ext.common.method import all_methods


PAIRS = [pair for method in training_methods().values() for pair in method.trainers.items()]


@pytest.mark.parametrize("trainer, config", PAIRS)
def test_a_trainer_takes_what_its_parent_takes(trainer, config):
    trainer, config = getattr(trl_ext, trainer), getattr(trl_ext, config)
    parent = next(cls for cls in trainer.__mro__ if cls in (trl.SFTTrainer, trl.GRPOTrainer))
    assert issubclass(trainer, SafeCheckpointMixin)
    assert issubclass(config, {trl.SFTTrainer: trl.SFTConfig, trl.GRPOTrainer: trl.GRPOConfig}[parent])
    parameters = inspect.signature(trainer.__init__).parameters.values()
    passes_on = {parameter.kind for parameter in parameters} >= {inspect.Parameter.VAR_KEYWORD}
    wanted = inspect.signature(parent.__init__).parameters.keys()
    assert passes_on or {parameter.name for parameter in parameters} >= wanted


@pytest.mark.parametrize("config", sorted({config for _, config in PAIRS}))
def test_every_field_of_a_configuration_has_help(config):
    cls = getattr(trl_ext, config)
    own = [base for base in cls.__mro__ if base.__module__.startswith("trl_ext")]
    names = {name for base in own for name in vars(base).get("__annotations__", {}) if not name.startswith("_")}
    fields = [field for field in dataclasses.fields(cls) if field.name in names]
    assert fields, config
    for field in fields:
        assert (field.metadata.get("help") or "").endswith("."), f"{config}.{field.name}"


@pytest.mark.parametrize("name", sorted(training_methods()))
def test_a_record_names_public_classes_with_a_card(name):
    method = training_methods()[name]
    for trainer, config in method.trainers.items():
        assert {trainer, config} <= method.exports.keys()
        cls = getattr(trl_ext, trainer)
        assert cls._name and cls._tag_names[0] == "trl"


@pytest.mark.parametrize("name", sorted(n for n, method in all_methods().items() if method.key))
def test_a_record_with_modules_names_what_attaches_and_opens_them(name):
    method = all_methods()[name]
    assert {method.attach, method.loader} <= method.exports.keys()
    assert dataclasses.is_dataclass(method.settings_class())
    assert callable(getattr(unsloth_ext, method.attach)) and hasattr(
        getattr(unsloth_ext, method.loader), "from_pretrained"
    )
    assert method.about.endswith(".") and "{where}" in method.example and method.what and method.dropped
    assert any(export.startswith("with_") for export in method.exports)


def test_public_names_belong_to_one_method():
    for records in (all_methods(), training_methods()):
        names = [name for method in records.values() for name in method.exports]
        assert len(names) == len(set(names))
    assert importlib.import_module("trl_ext").__all__ == sorted(trl_ext._WHERE)
