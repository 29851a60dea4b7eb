"""What every method promises, asked of its record: trainers are drop-ins, and configurations explain their fields."""

import dataclasses
import inspect

import pytest
import trl

import trl_ext
import unsloth_ext
from tests.test_house import ROOT
from trl_ext.common.checkpointing import SafeCheckpointMixin
from trl_ext.common.method import training_methods
from unsloth_ext.common.method import all_methods, attaching_methods


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
    for trainer in method.trainers:
        cls = getattr(trl_ext, trainer)
        parent = next(base for base in cls.__mro__ if base in (trl.SFTTrainer, trl.GRPOTrainer))
        assert cls._name != parent._name and cls._tag_names != parent._tag_names, "model cards would name the parent"
        assert cls._tag_names[0] == "trl"
        assert cls._latent_method == (name if name in attaching_methods() else None)


@pytest.mark.parametrize("name", sorted(n for n, method in all_methods().items() if method.key))
def test_a_record_with_modules_names_what_attaches_and_opens_them(name):
    method = all_methods()[name]
    assert dataclasses.is_dataclass(method.settings_class())
    assert callable(getattr(unsloth_ext, method.attach)) and hasattr(
        getattr(unsloth_ext, method.loader), "from_pretrained"
    )
    assert method.about.endswith(".") and "{where}" in method.example
    assert any(export.startswith("with_") for export in method.exports)


@pytest.mark.parametrize("name", sorted(name for name, method in training_methods().items() if method.gpu_check))
def test_the_gpu_check_of_a_record_is_there(name):
    assert (ROOT / "benchmarks" / training_methods()[name].gpu_check).is_file()
