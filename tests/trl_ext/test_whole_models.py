"""A model that a trainer loads by its name is whole, or what it lacks is named: it would be drawn at random."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from tests import tiny
from tests.trl_ext.concept import setups as concept
from tests.trl_ext.distill import setups as distill
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv
from tests.trl_ext.latent import setups as latent
from tests.trl_ext.planner import setups as planner
from tests.trl_ext.planner.test_resume import edit
from tests.trl_ext.ppo import setups as ppo
from trl_ext.minimind.stage import resumable
from trl_ext.teacher import load_teacher


NORM = "model.layers.1.input_layernorm.weight"


def stock(folder, model):
    args = SFTConfig(str(folder), use_cpu=True, bf16=False, report_to="none", max_steps=1)
    return resumable(SFTTrainer)(model, args, train_dataset=hrpo.prompts(), processing_class=tiny.tokenizer())


MAKE = {
    "hrpo": hrpo.hrpo, "ppo": ppo.ppo, "latent": latent.trainer, "concept": concept.trainer, "planner": planner.trainer,
    "kv": kv.trainer, "logits": distill.logits, "reasoning": distill.reasoning, "stage": stock,
    "teacher": lambda folder, model: load_teacher(model, None, False, torch.device("cpu")),
    "kv's teacher": lambda folder, model: kv.trainer(folder, given_teacher=model),
    "critic": lambda folder, model: ppo.ppo(folder, critic_model=model),
}  # fmt: skip
SPOILT = {
    f"(lacks|has no) {NORM}": lambda tensors: tensors.pop(NORM),
    f"{NORM} holds NaN or infinity": lambda tensors: tensors.update({NORM: tensors[NORM] * torch.nan}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Of a model that lacks a tensor, and of one with NaN."""
    made = {}
    for said, spoil in SPOILT.items():
        folder = tmp_path_factory.mktemp("model")
        concept.base().save_pretrained(folder)
        tiny.tokenizer(()).save_pretrained(folder)
        edit(folder / "model.safetensors", spoil)
        made[said] = folder
    return made


@pytest.mark.parametrize("name", MAKE)
def test_what_it_lacks_is_named(folders, tmp_path, name):
    for said, folder in folders.items():
        with pytest.raises(ValueError, match=said) as error:
            MAKE[name](tmp_path, model=str(folder))
        assert str(folder) in str(error.value)


def test_transformers_draws_it_at_random(folders):
    """A canary: where this fails, loading by name refuses it without us."""
    AutoModelForCausalLM.from_pretrained(next(iter(folders.values())))
