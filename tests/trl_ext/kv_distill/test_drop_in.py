"""What one expects of an SFTTrainer: callbacks, metrics of one's own, pushing, several evaluation sets, the constructor."""

import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import transformers.trainer
from datasets import Dataset
from transformers import TrainerCallback
from trl import SFTTrainer

from tests import tiny
from trl_ext import KVDistillConfig, KVDistillTrainer

from . import setups


def test_compute_metrics_sees_logits_and_labels(tmp_path):
    """Their cross-entropy is the evaluation's, 1e-5."""
    seen = {}

    def metrics(prediction) -> dict:
        logits, labels = (torch.from_numpy(x) for x in (prediction.predictions, prediction.label_ids))
        seen["shape"] = tuple(logits.shape)
        ce = torch.nn.functional.cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=-100)
        return {"ce": ce.item()}

    trainer = setups.trainer(tmp_path, per_device_eval_batch_size=8)
    trainer.compute_metrics = metrics
    found = trainer.evaluate()
    assert seen["shape"][0] == 8 and found["eval_ce"] == pytest.approx(found["eval_loss/ce"], abs=1e-5)


def test_several_gpus_in_one_process_are_not_data_parallel(tmp_path):
    """Two GPUs, as a process sees them that was not launched: the student stays on the first."""
    args = KVDistillConfig(**setups.settings(tmp_path))
    assert args.n_gpu <= 1  # which finds the devices out
    args._n_gpu = 2
    trainer = KVDistillTrainer(
        tiny.model("qwen3"),
        args,
        train_dataset=Dataset.from_list(setups.ROWS),
        processing_class=tiny.tokenizer(()),
        teacher_model=setups.teacher(),
    )
    assert trainer.args.n_gpu == 1 and trainer.args.train_batch_size == 4
    trainer.train()


def test_callbacks_and_several_evaluation_sets(tmp_path):
    class Count(TrainerCallback):
        steps = evaluations = 0

        def on_step_end(self, *_, **__):
            self.steps += 1

        def on_evaluate(self, *_, **__):
            self.evaluations += 1

    count = Count()
    trainer = setups.trainer(tmp_path, eval_strategy="steps", eval_steps=2)
    trainer.eval_dataset = {"a": trainer.eval_dataset, "b": trainer.eval_dataset.select(range(4))}
    trainer.add_callback(count)
    trainer.train()
    assert count.steps == 4 and count.evaluations == 4
    logged = {name for entry in trainer.state.log_history for name in entry}
    assert {"eval_a_loss", "eval_b_loss", "eval_kv/loss"} <= logged


def test_pushing_uploads_student_projection_card_and_no_pickle(tmp_path, monkeypatch):
    uploaded = {}

    class Hub:
        def create_repo(self, name, **_):
            return SimpleNamespace(repo_id=f"someone/{name}")

        def upload_folder(self, repo_id, folder_path, **_):
            uploaded[repo_id] = {str(f.relative_to(folder_path)) for f in Path(folder_path).rglob("*") if f.is_file()}

    monkeypatch.setattr(transformers.trainer, "hf_api", lambda *_, **__: Hub())
    trainer = setups.trainer(tmp_path / "pushed", peft=True)
    trainer.train()
    trainer.push_to_hub()
    (files,) = uploaded.values()
    assert {"adapter_model.safetensors", "README.md", "aligner/aligner.safetensors", "aligner/aligner.json"} <= files
    assert not {name for name in files if name.endswith((".bin", ".pt", ".pkl"))}
    card = (tmp_path / "pushed" / "README.md").read_text()
    assert "KV distillation" in card and "kv-distillation" in card


def test_the_constructor_is_sfttrainers(tmp_path, monkeypatch):
    """Arguments by position, and a configuration of one's own where none is given."""
    monkeypatch.chdir(tmp_path)
    rows, tokenizer = Dataset.from_list(setups.ROWS), tiny.tokenizer(())
    args = KVDistillConfig(output_dir="a", use_cpu=True, bf16=False, answer_delimiter="##", lambda_kv=0.5)
    trainer = KVDistillTrainer(tiny.model(), args, None, rows, rows, tokenizer, teacher_model=setups.teacher())
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == len(rows)
    ours = {n for n, p in inspect.signature(KVDistillTrainer.__init__).parameters.items() if p.kind == p.KEYWORD_ONLY}
    assert ours == {"teacher_model", "teacher_processing_class"}
    assert not ours & inspect.signature(SFTTrainer.__init__).parameters.keys()
    with pytest.raises(ValueError, match="needs a KVDistillConfig"):
        KVDistillTrainer(tiny.model(), setups.LoraConfig(), train_dataset=rows)


def test_a_conversation_has_its_segments(tmp_path):
    """By the chat template: user and template are the prompt."""
    tokenizer = tiny.tokenizer(())
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'user' %}q {{ m.content }} a {% else %}{{ m.content }}<eos>{% endif %}"
        "{% endfor %}"
    )
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{a}+1"}],
            "completion": [{"role": "assistant", "content": f"so {a + 1}##{a + 1}"}],
        }
        for a in range(1, 9)
    ]
    trainer = setups.trainer(tmp_path, rows=rows, tokenizer=tokenizer, max_steps=1)
    row = trainer.train_dataset[0]
    ids, segments = torch.tensor(row["input_ids"]), torch.tensor(row["segment_ids"])
    texts = [tokenizer.decode(ids[segments == s]) for s in range(3)]
    assert texts[0].startswith("q ") and texts[1].endswith("##") and texts[2] == texts[1][3:-2] + "<eos>"
    trainer.train()
