"""Each method on each engine: refused by name before anything is loaded, or not refused."""

import types

import pytest
from datasets import Dataset
from packaging.version import Version

from patches import versions
from tests import tiny
from tests.processes import ROOT
from tests.trl_ext.concept import setups as concept
from tests.trl_ext.distill import setups as distill
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv
from tests.trl_ext.latent import setups as latent
from tests.trl_ext.planner import setups as planner
from tests.trl_ext.ppo import setups as ppo
from tests.trl_ext.spo import setups as spo
from trl_ext import ConceptConfig, ConceptTrainer
from trl_ext.common import engines


NOWHERE = "no-such-folder/model"


def own_optimizer(folder):
    args = ConceptConfig(**concept.settings(folder))
    args.deepspeed_plugin = types.SimpleNamespace(zero_stage=2, deepspeed_config={"optimizer": {"type": "AdamW"}})
    ConceptTrainer(NOWHERE, args, train_dataset=Dataset.from_list(concept.ROWS), processing_class=tiny.tokenizer(()))


# What a method, or a method with an option, constructs
MAKE = {
    "HRPO": lambda folder: hrpo.hrpo(folder, model=NOWHERE),
    "HRPO with use_vllm=True": lambda folder: hrpo.hrpo(folder, model=NOWHERE, use_vllm=True),
    "HRPO with ds3_gather_for_generation=False": lambda folder: hrpo.hrpo(
        folder, model=NOWHERE, ds3_gather_for_generation=False
    ),
    "Adafactor": lambda folder: distill.logits(folder, model=NOWHERE, optim="adafactor"),
    "An optimizer in DeepSpeed's file": lambda folder: own_optimizer(folder),
    "Latent distillation": lambda folder: latent.trainer(folder, peft=False, model=NOWHERE),
    "Latent distillation with an adapter": lambda folder: latent.trainer(folder, model=NOWHERE),
    "Latent distillation with reset_optimizer=True": lambda folder: latent.trainer(
        folder, peft=False, model=NOWHERE, **latent.STAGED, reset_optimizer=True
    ),
    "Latent distillation with w_step_decoder": lambda folder: latent.trainer(
        folder, peft=False, model=NOWHERE, w_step_decoder=1.0
    ),
    "Latent distillation with w_step_decoder and fp16=True": lambda folder: latent.trainer(
        folder, peft=False, model=NOWHERE, w_step_decoder=1.0, fp16=True
    ),
    "Logits distillation": lambda folder: distill.logits(folder, model=NOWHERE),
    "Reasoning distillation": lambda folder: distill.reasoning(folder, model=NOWHERE),
    "KV distillation": lambda folder: kv.trainer(folder, model=NOWHERE),
    "KV distillation with fp16=True": lambda folder: kv.trainer(folder, model=NOWHERE, fp16=True),
    "Concept tokens": lambda folder: concept.trainer(folder, model=NOWHERE),
    "Concept tokens with an adapter": lambda folder: concept.trainer(folder, model=NOWHERE, peft=True),
    "Concept tokens with codebook_init='kmeans'": lambda folder: concept.trainer(
        folder, model=NOWHERE, codebook_init="kmeans"
    ),
    "Concept tokens with calibrate_null=True": lambda folder: concept.trainer(
        folder, model=NOWHERE, calibrate_null=True
    ),
    "Planner-executor": lambda folder: planner.trainer(folder, model=NOWHERE),
    "PPO": lambda folder: ppo.ppo(folder, model=NOWHERE),
    "PPO with fp16=True": lambda folder: ppo.ppo(folder, model=NOWHERE, fp16=True),
    "SPO": lambda folder: spo.spo(folder, model=NOWHERE),
}


def test_the_table_is_tested_whole():
    assert MAKE.keys() | {"A recipe"} >= engines.REFUSED.keys()  # of recipes, see tests/trl_ext/cli/test_recipe.py
    assert all(cells.keys() <= engines.ENGINES.keys() for cells in engines.REFUSED.values())


def test_the_page_has_the_table():
    assert engines.table() in (ROOT / "docs" / "engines.md").read_text(), "run python -m trl_ext.common.engines"


@pytest.mark.parametrize("engine", engines.ENGINES)
@pytest.mark.parametrize("method", MAKE)
def test_a_cell(tmp_path, monkeypatch, method, engine):
    monkeypatch.setattr(engines, "engine_of", lambda args: engine)
    parts = method.split(" and ")[0], method  # an option with another one
    rows = (row for row in (method.partition(" with ")[0], *parts) if engine in engines.REFUSED.get(row, {}))
    refused = next(rows, None)
    with pytest.raises((ImportError, OSError, ValueError)) as error:  # the model is not there
        MAKE[method](tmp_path)
    if refused:
        assert str(error.value).startswith(f"{refused} cannot train on {engines.ENGINES[engine]}: ")
    else:
        assert "cannot train on" not in str(error.value)


@pytest.mark.parametrize(
    "given, environment, engine",
    [
        ({"deepspeed_plugin": types.SimpleNamespace(zero_stage=3)}, {}, "zero3"),
        ({"fsdp_plugin_args": {"fsdp_version": 2}}, {}, "fsdp2"),
        ({}, {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, "fsdp2"),
        ({}, {"ACCELERATE_USE_FSDP": "true"}, "fsdp1"),
        ({}, {}, None),
    ],
)
def test_the_engine_of_a_launch(monkeypatch, given, environment, engine):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    args = types.SimpleNamespace(**{"deepspeed_plugin": None, "fsdp_plugin_args": None, **given})
    assert engines.engine_of(args) == engine


@pytest.mark.parametrize(
    "version, engine, refused", [("2.12.1", "fsdp2", True), ("2.13.0", "fsdp2", False), ("2.12.1", None, False)]
)
def test_fsdp2_needs_a_newer_torch(monkeypatch, tmp_path, version, engine, refused):
    """It is refused before the model is looked at."""
    monkeypatch.setattr(engines, "engine_of", lambda args: engine)
    real = versions._version_of
    monkeypatch.setattr(versions, "_version_of", lambda name: Version(version) if name == "torch" else real(name))
    if refused:
        with pytest.raises(ValueError, match=r"FSDP2 needs torch 2\.13 or newer here, and torch 2\.12\.1 is installed"):
            hrpo.hrpo(tmp_path, model="nowhere")
    else:
        engines.check_torch(None)
