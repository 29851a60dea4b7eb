"""`latent-reasoning card`, and what a trainer writes into the card of what it saves."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
from huggingface_hub import EvalResult, ModelCard

from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv
from trl_ext.cli import card
from unsloth_ext.common.model_card import PART, with_results


RESULT = {"task": "sums", "n": 20, "accuracy": 0.75, "low": 0.5, "high": 0.9, "tokens": 7.5, "forwards": 9.0}
EVALUATION = {
    "checkpoint": "run/final",
    "flags": {"limit": 3, "load_in_4bit": True, "data": ["gsm8k=/home/me/x"], "checkpoint": "run/final"},
    "results": [
        {**RESULT, "state": "on", "latent_share": 0.5},
        {**RESULT, "state": "zero", "accuracy": 0.25, "latent_share": 0.5},
    ],
    "harness": [
        {"task": "arc", "state": "off", "metric": "acc", "filter": "none", "n": 3, "value": 0.5, "stderr": None},
    ],
}
BEFORE, AFTER = ({"n": 20, "accuracy": x, "low": x - 0.1, "high": x + 0.1, "nll": x} for x in (0.25, 0.75))
SUMMARY = {"before": BEFORE, "after": AFTER | {"note": "text"}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run with a saved model in it."""
    folder = tmp_path_factory.mktemp("of") / "run"
    folder.mkdir()
    trainer = hrpo.hrpo(folder, max_steps=2)
    trainer.train()
    trainer.save_model(folder / "final")
    return folder


def text_of(folder: Path) -> str:
    return (folder / "final" / "README.md").read_text()


def test_a_trainer_writes_how_it_trained(trained):
    """Steps, the last figures of the trainer's state, settings, versions, and the paper of the method."""
    text = text_of(trained)
    assert "2 steps of `HRPOTrainer`, a method introduced in [Hybrid Latent Reasoning via" in text
    assert re.search(r"\| `loss` \| -?[\d.e-]+ \|", text) and "| `learning_rate` | `0.001` |" in text
    assert "| `answer_delimiter` | `#` |" in text and "- transformers: 5." in text
    assert "@article{yue2025hybrid" in text and text.index("## How to open it") < text.index("## Training")
    assert str(Path.home()) not in text


def test_an_ordinary_models_card_says_it_too(tmp_path):
    trainer = kv.trainer(tmp_path, max_steps=2)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    assert "2 steps of `KVDistillTrainer`" in text_of(tmp_path) and "| `lambda_kv` |" in text_of(tmp_path)


def test_results_come_into_the_card_and_replace_older_ones(trained, capsys):
    """Beside what somebody wrote; the hub's metadata has the accuracy of the model as it was trained."""
    final = trained / "final"
    (trained / "summary.json").write_text(json.dumps(SUMMARY))
    (trained / "curves.png").write_bytes(b"picture")
    (final / "eval.json").write_text(json.dumps(EVALUATION))
    (final / "eval.png").write_bytes(b"picture")
    (final / "README.md").write_text(f"{text_of(trained)}\n## Mine\n")
    assert card.main([str(final)]) == 0
    assert "summary.json, curves.png, eval.json" in capsys.readouterr().out.replace("\n", " ")
    text = text_of(trained)
    assert "training (20 questions):" in text and "| `nll` | 0.25 | 0.75 |" in text and "| `low` |" not in text
    assert "| accuracy (95% interval) | 25.0% (15.0% to 35.0%) | 75.0% (65.0% to 85.0%) |" in text
    assert "![Curves of the training](curves.png)" in text
    assert "| sums | zero | 20 | 25.0% (50.0% to 90.0%) | 7.5 | 9.0 | 50.0% |" in text
    assert "| arc | off | acc (none) | 3 | 0.5000 |  |" in text and (final / "curves.png").read_bytes() == b"picture"
    assert (
        text.index("## How to open it") < text.index("## Results") < text.index("## Training") < text.index("## Mine")
    )
    assert "With `limit` 3, `load_in_4bit` True." in text and "/home/me" not in text
    assert accuracies(text) == [("sums", 0.75)]
    beside = {"latent tokens": [BEFORE, AFTER], "latent tokens: zero": [None, BEFORE]}
    (trained / "summary.json").write_text(json.dumps({**SUMMARY, "results": beside}))
    card.main([str(final)])
    again = text_of(trained)
    assert again.count("## Results") == again.count("## Training") == again.count("## Mine") == 1
    assert "| accuracy, latent tokens (95% interval) | 25.0% (15.0%" in again and PART.search(again)
    assert "| accuracy, latent tokens: zero (95% interval) |  | 25.0% (15.0% to 35.0%) |" in again
    card.main([str(final)])
    assert text_of(trained) == again, "nothing changes without a change"


def accuracies(text):
    return [(one.dataset_type, one.metric_value) for one in ModelCard(text).data.eval_results or []]


def evaluated(folder, **changes):
    """The evaluation of other weights, or of these."""
    (folder / "eval.json").write_text(json.dumps({**EVALUATION, **changes}))


def test_the_hub_sees_what_the_table_says_beside_what_others_wrote(trained):
    final = trained / "final"
    other = EvalResult("text-generation", "gsm8k", "GSM8K", "exact_match", 0.25)
    read = ModelCard(text_of(trained))
    read.data.eval_results, read.data.model_name = [other], "mine"
    (final / "README.md").write_text(str(read))
    for share in (0.5, 0.875):
        evaluated(final, results=[{**RESULT, "state": "on", "latent_share": 0.5, "accuracy": share}])
        card.main([str(final)])
        assert accuracies(text_of(trained)) == [("gsm8k", 0.25), ("sums", share)]
    evaluated(final, results=[])
    card.main([str(final)])
    assert accuracies(text_of(trained)) == [("gsm8k", 0.25)]


def test_results_of_other_weights_are_left_out(trained, capsys):
    """Of another model; of before a later training; and those of the whole run for a checkpoint of it."""
    final = trained / "final"
    evaluated(final, checkpoint="some/other-model")
    card.main([str(final)])
    assert "is left out: it is an evaluation of some/other-model" in capsys.readouterr().out.replace("\n", " ")
    evaluated(final)
    (weights,) = final.glob("*.safetensors")
    os.utime(weights, (2e9, 2e9))
    card.main([str(final)])
    assert "the weights are newer" in capsys.readouterr().out.replace("\n", " ")
    assert "| sums |" not in text_of(trained) and "| `nll` |" in text_of(trained)
    os.utime(weights, (1e9, 1e9))
    shutil.copytree(final, trained / "checkpoint-1")
    (trained / "checkpoint-1" / "eval.json").unlink()
    page = trained / "checkpoint-1" / "README.md"
    page.write_text(with_results(page.read_text(), ""))  # as the trainer wrote it
    card.main([str(trained / "checkpoint-1")])
    assert "| `nll` |" not in page.read_text()
    shutil.rmtree(trained / "checkpoint-1")


def test_results_stay_where_they_cannot_be_measured_again(trained, tmp_path, capsys):
    """In a copy of the model without its run, and beside a new evaluation of it."""
    (trained / "summary.json").write_text(json.dumps(SUMMARY))
    evaluated(trained / "final")
    card.main([str(trained / "final")])
    copy = shutil.copytree(trained / "final", tmp_path / "copy")
    before = (copy / "README.md").read_text()
    (copy / "eval.json").unlink()
    card.main([str(copy)])
    assert "no results found" in capsys.readouterr().out and (copy / "README.md").read_text() == before
    (copy / "eval.json").write_text(json.dumps({**EVALUATION, "checkpoint": "copy", "harness": []}))
    card.main([str(copy)])
    again = (copy / "README.md").read_text()
    assert "| `nll` | 0.25 | 0.75 |" in again and "| arc |" not in again and "| sums | on |" in again
    (copy / "eval.json").unlink()
    (tmp_path / "summary.json").write_text(json.dumps({"after": {"n": 3, "a|b\n## Training\n": 1.0}}))
    card.main([str(copy), "--run", str(tmp_path)])
    page = (copy / "README.md").read_text()
    assert "| `a\\|b ## Training ` |  | 1 |" in page and "| sums | on |" in page and page.count("\n## Training\n") == 1


@pytest.mark.parametrize("after", [{}, {"note": "text"}])
def test_a_summary_without_figures_is_no_result(trained, after):
    before = text_of(trained)
    (trained / "summary.json").write_text(json.dumps({"after": after}))
    card.main([str(trained / "final")])
    assert text_of(trained) == before


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"---\na: [\n---\n", b"---\n- a\n---\n"])
def test_a_card_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "README.md").write_bytes(content)
    with pytest.raises(ValueError, match=r"README\.md cannot be read as a model card"):
        card.main([str(tmp_path)])


def test_a_part_that_was_changed_by_hand_is_told(trained, capsys):
    final = trained / "final"
    before = text_of(trained)
    (final / "README.md").write_text(before.replace("## How to open it", "## How I open it"))
    evaluated(final, results=[{**RESULT, "state": "on", "latent_share": 0.5, "accuracy": 0.125}])
    card.main([str(final)])
    assert "was changed by hand, so no results were put in" in capsys.readouterr().out.replace("\n", " ")
    assert "12.5%" not in text_of(trained) and 0.125 not in [value for _, value in accuracies(text_of(trained))]
    (final / "README.md").write_text(before)


@pytest.mark.parametrize(
    "name, content",
    [
        ("summary.json", {"after": None}),
        ("summary.json", {"after": [1]}),
        ("eval.json", {"checkpoint": "run/final", "results": [{"task": "sums"}]}),
        ("eval.json", {"checkpoint": "run/final", "results": [{**RESULT, "state": "on", "accuracy": None}]}),
        ("eval.json", {"checkpoint": "run/final", "results": "none"}),
        ("eval.json", {"checkpoint": "run/final", "harness": [{"value": "N/A"}]}),
    ],
)
def test_damaged_results_are_named(trained, name, content):
    final = trained / "final"
    kept = text_of(trained)
    file = trained / name if name == "summary.json" else final / name
    before = file.read_text() if file.is_file() else None
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{name}: not what this project writes there"):
        card.main([str(final)])
    assert text_of(trained) == kept
    file.unlink() if before is None else file.write_text(before)


def test_what_cannot_be_is_told(trained, tmp_path):
    for flags, said in (
        (["nowhere"], "nowhere: there is no such folder"),
        ([str(tmp_path)], "has no model card of this project"),
        ([str(trained / "final"), "--run", "nowhere"], "--run nowhere: there is no such folder"),
    ):
        with pytest.raises(ValueError, match=said):
            card.main(flags)
    (trained / "final" / "eval.json").write_text("{")
    with pytest.raises(ValueError, match=r"eval\.json is not JSON"):
        card.main([str(trained / "final")])
    (trained / "final" / "eval.json").unlink()


def test_a_card_without_results_stays_as_it_is(tmp_path, capsys):
    trainer = hrpo.hrpo(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(tmp_path / "final")
    before = text_of(tmp_path)
    assert card.main([str(tmp_path / "final")]) == 0 and text_of(tmp_path) == before
    assert "no results found" in capsys.readouterr().out
