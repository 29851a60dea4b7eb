"""What one expects of an SFTTrainer, asked of each method's trainer: callbacks, several evaluation sets, metrics of one's
own, pushing, and no data parallelism by threads."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from transformers import TrainerCallback

from tests.trl_ext.concept import setups as concept
from tests.trl_ext.kv_distill import setups as kv_distill
from tests.trl_ext.latent import setups as latent
from tests.trl_ext.planner import setups as planner


# What makes the trainer; the term of the loss that `compute_metrics` can check; logs; what is uploaded; words of the card
METHODS = {
    "concept": (concept, {}, "loss/ce", {"eval_concept/ratio", "concept/perplexity"}, set(), "Concept tokens"),
    "kv_distill": (
        kv_distill,
        {},
        "loss/ce",
        {"eval_kv/loss"},
        {"aligner/aligner.safetensors", "aligner/aligner.json"},
        "KV distillation",
    ),
    "latent": (latent, latent.CASES["kv"], None, set(), {"tokenizer.json"}, "KaVa"),
    "planner": (
        planner,
        {},
        "loss/executor",
        {"eval_loss/executor", "eval_delta_nll_null"},
        {"tokenizer_config.json"},
        "Planner-executor",
    ),
}


@pytest.fixture(params=METHODS)
def method(request):
    setups, settings, *wanted = METHODS[request.param]
    return lambda folder, **changes: setups.trainer(folder, **{**settings, **changes}), *wanted


@pytest.mark.parametrize("method", [name for name, (_, _, term, *_) in METHODS.items() if term], indirect=True)
def test_compute_metrics_sees_logits_and_labels(tmp_path, method):
    """Their cross-entropy, shifted as a causal LM's is, is the evaluation's: 1e-5. Latent trainers predict the answer
    alone; their test stands in latent/test_drop_in.py."""
    make, term, *_ = method
    seen = {}

    def metrics(prediction) -> dict:
        logits, labels = (torch.from_numpy(x) for x in (prediction.predictions, prediction.label_ids))
        seen["shape"] = tuple(logits.shape)
        ce = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100)
        return {"ce": ce.item()}

    trainer = make(tmp_path, per_device_eval_batch_size=8)
    trainer.compute_metrics = metrics
    found = trainer.evaluate()
    assert seen["shape"][0] == 8 and found["eval_ce"] == pytest.approx(found[f"eval_{term}"], abs=1e-5)


def test_callbacks_and_several_evaluation_sets(tmp_path, method):
    class Count(TrainerCallback):
        steps = evaluations = 0

        def on_step_end(self, *_, **__):
            self.steps += 1

        def on_evaluate(self, *_, **__):
            self.evaluations += 1

    make, _, logs, *_ = method
    count = Count()
    trainer = make(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset.select(range(4))}
    trainer.add_callback(count)
    trainer.train()
    assert count.steps == 4 and count.evaluations == 4
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_a_loss", "eval_b_loss", *logs} <= logged


def test_pushing_uploads_what_loads_with_a_card_and_no_pickle(tmp_path, monkeypatch, method):
    uploaded = {}

    class Hub:
        def create_repo(self, name, **_):
            return SimpleNamespace(repo_id=f"someone/{name}")

        def upload_folder(self, repo_id, folder_path, **_):
            uploaded[repo_id] = {str(f.relative_to(folder_path)) for f in Path(folder_path).rglob("*") if f.is_file()}

    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *_, **__: Hub())
    make, *_, more, title = method
    trainer = make(tmp_path / "pushed", peft=True)
    trainer.train()
    trainer.push_to_hub()
    ((place, files),) = uploaded.items()
    assert place == "someone/pushed"
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md", *more} <= files
    assert not {name for name in files if name.endswith((".bin", ".pt", ".pkl"))}
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert title in card and trainer._tag_names[-1] in card


@pytest.mark.parametrize(
    "setups, name", [(concept, "ConceptConfig"), (kv_distill, "KVDistillConfig"), (planner, "PlannerExecutorConfig")]
)
def test_several_gpus_in_one_process_are_not_data_parallel(tmp_path, monkeypatch, setups, name):
    """Two GPUs, as a process sees them that was not launched: training stays on the first."""
    config = getattr(setups, name)

    def with_two(**fields):
        args = config(**fields)
        assert args.n_gpu <= 1  # which finds the devices out
        args._n_gpu = 2
        return args

    monkeypatch.setattr(setups, name, with_two)
    trainer = setups.trainer(tmp_path)
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == 4
    trainer.train()
