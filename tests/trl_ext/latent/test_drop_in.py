"""What one expects of an SFTTrainer: callbacks, metrics of one's own, pushing, several evaluation sets, iterable data."""

import functools
import inspect

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import SFTTrainer

import trl_ext
from tests import tiny
from unsloth_ext import LatentConfig, LatentModel, attach_latent, backbone_of

from . import setups


def test_compute_metrics_sees_the_answers_logits_and_labels(tmp_path):
    """Predictions (N, A, V) are the student's; their cross-entropy at the labels is the evaluation's."""
    seen = {}

    def metrics(prediction) -> dict:
        seen["shapes"] = prediction.predictions.shape, prediction.label_ids.shape
        logits, labels = (torch.from_numpy(np.asarray(x)) for x in (prediction.predictions, prediction.label_ids))
        ce = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100)
        return {"ce": ce.item()}

    trainer = setups.trainer(tmp_path, per_device_eval_batch_size=8, **setups.CASES["kv"])
    trainer.compute_metrics = metrics
    found = trainer.evaluate()
    (rows, length, _), labels = seen["shapes"]
    assert rows == 8 and labels == (8, length)
    assert found["eval_ce"] == pytest.approx(found["eval_loss/ce_student"], abs=1e-5)


def test_an_iterable_dataset_trains_the_same(tmp_path):
    """Same rows in the same order: the same losses, bit for bit."""
    losses = []
    for iterable in (False, True):
        rows = Dataset.from_list(setups.ROWS)
        trainer = setups.trainer(tmp_path, train_sampling_strategy="sequential", **setups.CASES["jacobi"])
        if iterable:
            trainer = setups.trainer(tmp_path, dataset=rows.to_iterable_dataset(), **setups.CASES["jacobi"])
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert len(losses[0]) == 4 and losses[0] == losses[1]


def test_a_model_with_latent_tokens_keeps_what_it_was_made_with(tmp_path):
    """The configuration that its weights were trained for wins over the trainer's, and stays after saving."""
    model, tokenizer = tiny.model(std=0.1), tiny.tokenizer(())
    model.save_pretrained(tmp_path / "base")
    model.name_or_path = model.config._name_or_path = str(tmp_path / "base")
    attach_latent(model, tokenizer, LatentConfig(num_latents=3, iterations=1, projection_dim=8))
    trainer = setups.trainer(tmp_path / "out", model=model, num_latents=7, iterations=2)
    assert backbone_of(trainer.model).latent_config.num_latents == 3
    trainer.train()
    trainer.save_model(tmp_path / "final")
    loaded = backbone_of(LatentModel.from_pretrained(str(tmp_path / "final")).model).latent_config
    assert (loaded.num_latents, loaded.iterations, loaded.projection_dim) == (3, 1, 8)


def test_a_folder_of_a_whole_latent_model_goes_on_with_its_projection(tmp_path, caplog):
    """And says which settings it keeps; what the trainer saves is loaded again with it."""
    model, tokenizer = tiny.model(std=0.1), tiny.tokenizer(())
    attach_latent(model, tokenizer, LatentConfig(num_latents=3, iterations=1, projection_dim=8))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    caplog.set_level("WARNING")
    trainer = setups.trainer(tmp_path / "out", model=str(tmp_path / "base"), num_latents=7, iterations=1, peft=False)
    assert "num_latents=3 and keeps it; asked for: 7" in caplog.text
    wanted, found = (backbone_of(m).latent_projection.state_dict() for m in (model, trainer.model))
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    loaded = LatentModel.from_pretrained(str(tmp_path / "final")).model
    wanted, found = (dict(m.named_parameters()) for m in (trainer.model, loaded))
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)


def test_the_constructor_is_sfttrainers(tmp_path, monkeypatch):
    """Its first six arguments by position, and a configuration of one's own where none is given."""
    monkeypatch.chdir(tmp_path)
    rows, tokenizer = Dataset.from_list(setups.ROWS), tiny.tokenizer(())
    args = trl_ext.PCCoTConfig(output_dir="a", use_cpu=True, bf16=False, num_latents=4)
    trainer = trl_ext.PCCoTTrainer(tiny.model(), args, None, rows, rows, tokenizer)
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == len(rows)
    ours, theirs = (list(inspect.signature(c.__init__).parameters)[:7] for c in (setups.LatentTrainer, SFTTrainer))
    assert ours == theirs
    here = functools.partial(trl_ext.CODIConfig, bf16=False, use_cpu=True)  # this machine may have no GPU
    monkeypatch.setattr(trl_ext.CODITrainer, "_config_class", here)
    model = tiny.model()
    model.config._name_or_path = model.name_or_path = "us/tiny"
    made = trl_ext.CODITrainer(model, train_dataset=rows, processing_class=tokenizer).args
    assert isinstance(made, trl_ext.CODIConfig) and made.output_dir == "tiny-CODI"
