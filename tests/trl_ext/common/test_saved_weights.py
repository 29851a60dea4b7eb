"""What a checkpoint has lost, or holds that is not finite, is named before training; what is loaded is compared."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Trainer

from tests import tiny
from tests.installed import at_least
from tests.marks import slow
from tests.trl_ext.common import test_resume
from tests.trl_ext.common.test_checkpointing import sft, weights
from tests.trl_ext.concept import setups as concept
from tests.trl_ext.distill import setups as distill
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv
from tests.trl_ext.latent import setups as latent
from tests.trl_ext.planner import setups as planner
from tests.trl_ext.planner.test_resume import edit
from tests.trl_ext.ppo import setups as ppo
from trl_ext.common import saved_weights
from trl_ext.common.checkpointing import CheckpointError, SafeCheckpointMixin


def saved(folder, trainer):
    """A checkpoint of a trainer that has not trained."""
    trainer.save_model(str(folder))
    trainer.state.save_to_json(str(folder / "trainer_state.json"))
    return folder


MODEL, ADAPTER = "model.safetensors", "adapter_model.safetensors"
LOST = {
    "concepts, full": (concept.trainer, {}, MODEL, "model.concept_embedding.weight"),
    "concepts, adapter": (concept.trainer, {"peft": True}, ADAPTER, "concept_head"),
    "planner, full": (planner.trainer, {}, MODEL, "unified_head"),
    "planner, adapter": (planner.trainer, {"peft": True}, ADAPTER, "unified_head"),
    "latent, full": (latent.trainer, {"peft": False, "projection_dim": 16}, MODEL, "latent_projection"),
    "latent tokens": (latent.trainer, {"peft": True}, ADAPTER, "trainable_tokens_delta"),
    "tags": (distill.reasoning, {"peft": True}, ADAPTER, "trainable_tokens_delta"),
    "norm of a full model": (distill.logits, {}, MODEL, "model.norm.weight"),
    "thinking, full": (hrpo.hrpo, {"peft": False}, MODEL, "thinking_projection"),
    "thinking, adapter": (hrpo.hrpo, {}, ADAPTER, "thinking_residual_Lambda"),
    "aligner": (kv.trainer, {}, "aligner/aligner.safetensors", "dim_map"),
    "critic": (ppo.ppo, {}, "critic/model.safetensors", "score.weight"),
}


RARER = ("concepts, adapter", "planner, adapter", "latent, full", "tags")


@pytest.mark.parametrize("case", [slow(c) if c in RARER else c for c in LOST])
def test_a_lost_tensor_and_one_that_is_not_finite_are_named(tmp_path, case):
    """Of whatever belongs to a run, however the method calls it."""
    make, changes, file, name = LOST[case]
    trainer = make(tmp_path, **changes)
    folder = saved(tmp_path / "saved", trainer)
    SafeCheckpointMixin._check_checkpoint(trainer, folder)  # no more than the weights
    whole = load_file(folder / file)
    lost = next(key for key in sorted(whole) if name in key)
    for value in (torch.nan, -torch.inf):
        spoilt = whole[lost].clone()
        spoilt.view(-1)[-1] = value
        save_file({**whole, lost: spoilt}, folder / file, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"{lost} holds NaN or infinity") as error:
            trainer.train(resume_from_checkpoint=str(folder))
        assert file in str(error.value)
    save_file({key: x for key, x in whole.items() if key != lost}, folder / file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"{lost}"):
        trainer.train(resume_from_checkpoint=str(folder))


def run(folder, kind="PeftModel", steps=1, **changes):
    """A trained HRPO run whose reference is an adapter, and its checkpoint."""
    trainer = test_resume.RL["hrpo"](folder, kind, **{**test_resume.KL, **changes, "save_steps": 1, "max_steps": steps})
    trainer.train()
    return trainer, folder / "out" / f"checkpoint-{steps}"


def test_numbers_beside_the_weights_are_finite(tmp_path):
    """Optimizer and scheduler; the file and what is in it are named, and nothing has been loaded by then."""
    trainer, folder = run(tmp_path)
    key = next(iter(load_file(folder / "optimizer.safetensors")))
    edit(folder / "optimizer.safetensors", lambda x: x.update({key: x[key] * torch.nan}))
    with pytest.raises(CheckpointError, match=r"optimizer\.safetensors: .* holds NaN or infinity") as error:
        trainer.train(resume_from_checkpoint=str(folder))
    assert key in str(error.value)
    edit(folder / "optimizer.safetensors", lambda x: x.update({key: torch.zeros_like(x[key])}))
    scheduler = json.loads((folder / "scheduler.json").read_text())
    (folder / "scheduler.json").write_text(json.dumps({**scheduler, "base_lrs": [1e-3, torch.nan]}))
    with pytest.raises(CheckpointError, match=r"scheduler\.json: base_lrs\.1 is NaN"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_rollouts_that_go_on_are_finite(tmp_path):
    """Of a checkpoint between two passes over a rollout."""
    trainer, folder = run(tmp_path, num_iterations=2)
    trainer._check_checkpoint(folder)
    edit(folder / "rollout_0.safetensors", lambda x: x["0.advantages"].fill_(torch.nan))
    with pytest.raises(CheckpointError, match=r"rollout_0\.safetensors: 0\.advantages holds NaN"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_the_reference_is_part_of_a_checkpoint(tmp_path):
    """Lost, or not asked for any more, or of another kind of run: each is a sentence."""
    trainer, folder = run(tmp_path)
    for kind, changes in (("PeftModel", test_resume.NONE), ("peft_config", test_resume.KL)):
        other = test_resume.RL["hrpo"](tmp_path, kind, **changes)
        with pytest.raises(CheckpointError, match="holds an adapter 'ref', which this model lacks"):
            other.train(resume_from_checkpoint=str(folder))
    shutil.rmtree(folder / "ref")
    with pytest.raises(CheckpointError, match=r"ref/adapter_model\.safetensors is missing.*PeftModel"):
        trainer.train(resume_from_checkpoint=str(folder))


def test_a_reference_that_moves_is_part_of_a_checkpoint(tmp_path):
    trainer, folder = run(tmp_path, "full", **test_resume.MOVING)
    edit(folder / "ref_model" / "model.safetensors", lambda x: x.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"ref_model has no model\.norm\.weight"):
        trainer.train(resume_from_checkpoint=str(folder))
    shutil.rmtree(folder / "ref_model")
    with pytest.raises(CheckpointError, match=r"ref_model/model\.safetensors is missing"):
        trainer.train(resume_from_checkpoint=str(folder))


@pytest.mark.parametrize("loads", ["nothing", "another adapter", "rounded"])
def test_what_was_not_loaded_is_seen(tmp_path, monkeypatch, loads):
    """Whatever goes wrong in the libraries that load: the tensor is named."""
    trainer, folder = run(tmp_path)
    stock = saved_weights.set_peft_model_state_dict

    def broken(model, tensors, adapter_name):
        if loads == "nothing":
            return
        if loads == "another adapter":
            adapter_name = "ref"
        stock(
            model, {n: x.bfloat16() if loads == "rounded" else x for n, x in tensors.items()}, adapter_name=adapter_name
        )

    again = test_resume.RL["hrpo"](tmp_path, "PeftModel", **test_resume.KL)
    monkeypatch.setattr(saved_weights, "set_peft_model_state_dict", broken)
    with pytest.raises(
        CheckpointError, match=r"checkpoint-1: .* was read, but the model in memory holds another value"
    ):
        again.train(resume_from_checkpoint=str(folder))
    monkeypatch.undo()
    assert trainer.model is not again.model


def two_adapters(seed):
    """The trained one is not called "default", and has bf16 weights; the other is frozen."""
    torch.manual_seed(seed)
    lora = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(tiny.model(std=0.1), lora, adapter_name="policy", autocast_adapter_dtype=False)
    model.add_adapter("other", lora, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora" in name:
            parameter.data = parameter.data.bfloat16()
    return model


def test_names_dtypes_and_what_learns_stay(tmp_path):
    first = sft(tmp_path, two_adapters(0))
    folder = saved(tmp_path / "saved", first)
    again = sft(tmp_path, two_adapters(1))
    learning = {n: p.requires_grad for n, p in again.model.named_parameters()}
    again._check_checkpoint(folder)
    again._load_from_checkpoint(str(folder))
    a, b = weights(first), weights(again)
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)
    assert {n: p.requires_grad for n, p in again.model.named_parameters()} == learning
    assert again.model.active_adapters == ["policy"]
    assert {p.dtype for n, p in again.model.named_parameters() if "lora" in n} == {torch.bfloat16}


def kept_by_step(trainer):
    """What is trained, as it is when each checkpoint is written."""
    kept, save = {}, trainer._save_checkpoint

    def keep(*args):
        save(*args)
        kept[trainer.state.global_step] = ppo.trained(trainer)

    trainer._save_checkpoint = keep
    return kept


def test_the_best_adapters_are_loaded_whatever_they_are_called(tmp_path):
    """The first of two by a metric that likes losses."""
    trainer = sft(
        tmp_path,
        two_adapters(0),
        load_best_model_at_end=True,
        eval_strategy="steps",
        eval_steps=1,
        max_steps=2,
        greater_is_better=True,
        learning_rate=0.1,
    )
    kept = kept_by_step(trainer)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    after = ppo.trained(trainer)
    assert all(torch.equal(after[n], kept[1][n]) for n in after)
    assert any(not torch.equal(kept[1][n], kept[2][n]) for n in after if ".policy." in n)


def test_the_best_models_critic_comes_with_it(tmp_path):
    trainer = ppo.ppo(tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    kept = kept_by_step(trainer)
    trainer.train()
    trainer.state.best_model_checkpoint = str(tmp_path / "out" / "checkpoint-1")
    trainer._load_best_model()
    after = ppo.trained(trainer)
    assert all(torch.equal(after[n], kept[1][n]) for n in after)
    assert any(not torch.equal(kept[1][n], kept[2][n]) for n in after if n.startswith("critic."))


GIVEN = {
    "thinking": (hrpo.hrpo, {"peft": False}, "thinking_"),
    "concepts": (concept.trainer, {}, "concept_"),
    "planner": (planner.trainer, {}, "type_embedding"),
}


@pytest.mark.parametrize("case", GIVEN)
def test_a_saved_models_folder_given_as_the_model_goes_on_with_its_modules(tmp_path, case):
    """By its path, and loaded by a class that drops them; a folder that lost one, or that nobody knows, is refused."""
    make, changes, part = GIVEN[case]
    first = make(tmp_path, **changes)
    with torch.no_grad():
        for name, parameter in first.model.named_parameters():
            if part in name:
                parameter.fill_(0.125)
    folder = str(saved(tmp_path / "saved", first))
    ways = {"path": lambda: folder, "loaded": lambda: AutoModelForCausalLM.from_pretrained(folder)}
    for way, given in ways.items():
        torch.manual_seed(1)
        again = make(tmp_path / way, model=given(), **changes)
        found = [p for name, p in again.model.named_parameters() if part in name]
        assert found and all((p == 0.125).all() for p in found), way
    nowhere = ways["loaded"]()
    nowhere.config._name_or_path = nowhere.name_or_path = ""
    with pytest.raises(ValueError, match="its folder is unknown"):
        make(tmp_path / "nowhere", model=nowhere, **changes)
    edit(tmp_path / "saved" / MODEL, lambda x: x.pop(next(n for n in sorted(x) if part in n)))
    with pytest.raises(ValueError, match=part):
        make(tmp_path / "lost", model=folder, **changes)


def test_trainer_alone_would_load_the_reference_in_the_adapters_place(tmp_path):
    """A canary: since transformers 5.23 it loads a folder's own adapter beside those of its sub-folders."""
    trainer, folder = run(tmp_path)
    again = test_resume.RL["hrpo"](tmp_path, "PeftModel", **test_resume.KL)
    before = weights(again)
    Trainer._load_from_checkpoint(again, str(folder))
    after, trained = weights(again), weights(trainer)
    lora = [name for name in after if "lora_A.default" in name]
    loaded = at_least("transformers", "5.23")
    assert lora and all(torch.equal(after[name], before[name]) is not loaded for name in lora)
    assert all(torch.equal(after[name], trained[name]) is loaded for name in lora)


def test_weights_of_another_origin_are_told_of(tmp_path, caplog):
    """Of the same names and shapes: an adapter of another base, a method with other settings."""
    changes = {"num_latents": 3, "iterations": 2}
    for folder, seed in (("a", 0), ("b", 1)):
        tiny.model("qwen3", seed, std=0.1).save_pretrained(tmp_path / folder)
    bases = [AutoModelForCausalLM.from_pretrained(tmp_path / folder) for folder in ("a", "a", "b")]
    folder = saved(tmp_path / "saved", latent.trainer(tmp_path / "1", model=bases[0], **changes))
    latent.trainer(tmp_path / "2", model=bases[1], **changes).begin_with(folder)
    assert "was trained" not in caplog.text
    again = latent.trainer(tmp_path / "3", model=bases[2], num_latents=6, iterations=2)
    for go in (again.begin_with, again._check_checkpoint):
        caplog.clear()
        go(folder)
        assert f"was trained on {tmp_path / 'a'}, but this model is {tmp_path / 'b'}: " in caplog.text
        assert "other settings than this model has now: num_latents=6 (before: 3)\n" in caplog.text


@pytest.mark.parametrize(
    "change", [{"lora_alpha": 64}, {"use_rslora": True}, {"alpha_pattern": {"q_proj": 2}}], ids=str
)
def test_an_adapter_of_another_scale_is_told_of(tmp_path, caplog, change):
    """Its tensors are the same, and the model that they make is not."""

    def made(**changes):
        lora = LoraConfig(**{**test_resume.LORA, **changes})
        return sft(tmp_path, tiny.model(), lora)

    folder = saved(tmp_path / "saved", made())
    made()._check_checkpoint(folder)
    assert "other settings" not in caplog.text
    ((key, value),) = change.items()
    for go in (made(**change).begin_with, made(**change)._check_checkpoint):
        caplog.clear()
        go(folder)
        assert f"{folder} was trained with other settings than this model has now: {key}={value!r}" in caplog.text
