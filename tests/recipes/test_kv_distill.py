"""The KV distillation recipe as a person runs it: small, whole, and with what one can get wrong."""

import json
import runpy
import shlex
import sys
from pathlib import Path

import pytest

from tests import tiny
from tests.marks import slow
from tests.recipes.running import holds_no_pickle, run_recipe
from trl_ext.tasks import equations
from unsloth_ext import AttentionShape


RECIPE = Path(__file__).parents[2] / "recipes" / "kv_distill.py"
SMALL = shlex.split(
    "--teacher_steps 20 --max_steps 2 --eval_size 12 --eval_every 1 "
    "--disable_tqdm true --per_device_train_batch_size 8 --save_steps 1 --logging_steps 1"
)


@pytest.fixture
def run(monkeypatch, tmp_path, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(equations, "SMALL", equations.Size(rows=500))
    monkeypatch.setattr(equations, "TEACHER", equations.Size(rows=500, layers=3, width=64, heads=8, kv_heads=4))

    def start(*argv):
        run_recipe(monkeypatch, "kv_distill.py", *SMALL, *argv)

    return lambda *argv: start("--output_dir", "out", "--cache_dir", cache, *argv)


@pytest.mark.parametrize("mode", ["structured", slow("flat")])
def test_whole_run_and_resume(run, capsys, mode):
    run("--kv_projection_mode", mode)
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["steps"] == 2 and summary["n_eval"] == 12 and set(summary["accuracy_curve"]) == {"0", "1", "2"}
    assert {"kv/k", "kv/attn", "loss/ce"} <= summary["last"].keys()
    assert Path("out/curves.png").stat().st_size > 10_000
    assert "accuracy (95% interval)" in capsys.readouterr().out
    assert json.loads(Path("out/final/aligner/aligner.json").read_text())["mode"] == mode
    assert holds_no_pickle("out/final")
    run("--kv_projection_mode", mode, "--max_steps", "3", "--resume_from_checkpoint", "latest")
    again = json.loads(Path("out/summary.json").read_text())
    assert again["steps"] == 3 and again["accuracy_before"] == summary["accuracy_before"]
    assert again["accuracy_curve"].items() >= summary["accuracy_curve"].items()


def test_without_its_weight_it_is_sft(run):
    run("--lambda_kv", "0", "--eval_strategy", "steps", "--eval_steps", "1")
    assert not Path("out/final/aligner").exists()


@pytest.fixture
def files(tmp_path):
    """Folders of a student and a teacher, and GSM8K-like rows, one of them without its number."""
    tokenizer = tiny.tokenizer(())
    for name, family in (("student", "llama"), ("teacher", "qwen3")):
        tiny.model(family).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    rows = [
        {"question": f"{a} and {a}?", "answer": f"{a}+{a}=<<{a}+{a}={2 * a}>>{2 * a}\n#### {2 * a}"} for a in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "bad.jsonl").write_text("\n".join(map(json.dumps, [*rows[:3], {"question": "1?", "answer": "one"}])))
    return tmp_path


def own(files, **changes):
    flags = {
        "model_name": files / "student",
        "teacher_model_name_or_path": files / "teacher",
        "dataset": files / "rows.jsonl",
        "answer_delimiter": "####",
        "max_new_tokens": 8,
        "lora_r": 4,
        **changes,
    }
    config = files / "own.yaml"
    config.write_text("use_cpu: true\nbf16: false\nreport_to: none\n")
    return ["--config", config, *(str(part) for k, v in flags.items() if v is not None for part in (f"--{k}", v))]


def test_own_models_and_rows(run, files, capsys):
    run(*own(files))
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["n_eval"] == 12 and Path("out/final/adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"dataset": "bad.jsonl"}, "line 4: there is not exactly one number"),
        ({"dataset": "none.jsonl"}, "there is no such file"),
        ({"dataset": "tiny"}, "can only be used together"),
        ({"teacher_model_name_or_path": None}, "teacher_model: pass a teacher"),
        ({"kv_layer_map": "[0, 7]"}, "layer_map="),
        ({"eval_batch": 0}, "eval_batch=0: must be at least 1"),
        ({"resume_from_checkpoint": "latest"}, "no complete checkpoint"),
        ({"answer_delimiter": "=>"}, "cannot produce the delimiter|no row has text after"),
    ],
)
def test_what_is_wrong_is_named_before_training(run, files, monkeypatch, changes, message):
    monkeypatch.chdir(files)
    with pytest.raises((ValueError, SystemExit), match=message):
        run(*own(files, **changes))
    assert not list(Path("out").glob("checkpoint*"))


def test_a_teacher_of_another_vocabulary_is_named(run, files):
    tiny.tokenizer(("1#", "##")).save_pretrained(files / "student")
    with pytest.raises(ValueError, match="teacher and student have different vocabularies"):
        run(*own(files))


def test_the_tiny_teacher_differs_in_everything():
    shapes = [
        AttentionShape.of(equations.config(equations.tokenizer(), size)).to_dict()
        for size in (equations.TEACHER, equations.STUDENT)
    ]
    assert all(shapes[0][name] > shapes[1][name] for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim"))


@pytest.mark.parametrize("mode,columns", [("both", 4), ("structured", 2), ("flat", 2)])
def test_the_profile(run, monkeypatch, capsys, cache, mode, columns):
    profile = RECIPE.with_name("profile_alignment.py")
    argv = ["--cache_dir", cache, "--teacher_steps", 20, "--held_out", 12, "--batch_size", 4]
    argv += ["--mode", mode, "--output", "p"]
    monkeypatch.setattr(sys, "argv", [profile.name, *map(str, argv)])
    runpy.run_path(str(profile), run_name="__main__")
    found = json.loads(Path("p/profile.json").read_text())
    assert len(found) == columns and all(each["not_finite"] == 0 for each in found.values())
    for each in found.values():
        teacher, student, compared = each["shapes"]["q"]
        assert teacher[:3] == [4, 2, 8] and student[:3] == [4, 2, 4] and compared[:3] == [4, 2, 8]
    for name in [n for n in found if "fitted" in n]:
        assert found[name]["k"] < found[name.split(",")[0]]["k"]
    assert Path("p/profile.png").stat().st_size > 10_000 and "attention KL" in capsys.readouterr().out


def test_the_profile_of_own_models_and_a_trained_aligner(run, files, monkeypatch, capsys):
    run(*own(files, kv_projection_mode="flat"))
    profile = RECIPE.with_name("profile_alignment.py")
    argv = [
        "--teacher",
        files / "teacher",
        "--student",
        files / "student",
        "--aligner",
        "out/final/aligner",
        "--batch_size",
        4,
        "--dataset",
        files / "rows.jsonl",
        "--output",
        "p",
    ]
    monkeypatch.setattr(sys, "argv", [profile.name, *map(str, argv)])
    runpy.run_path(str(profile), run_name="__main__")
    assert list(json.loads(Path("p/profile.json").read_text())) == ["trained"]
    for wrong, message in (
        (["--batch_size", "40"], "needs 80 for its two batches"),
        (["--batch_size", "0"], "batch_size=0: must be at least 1"),
        (["--mode", "round"], "mode='round'"),
        (["--output", files / "rows.jsonl"], "rows.jsonl"),
    ):
        monkeypatch.setattr(sys, "argv", [profile.name, *map(str, argv), *map(str, wrong)])
        with pytest.raises((ValueError, OSError), match=message):
            runpy.run_path(str(profile), run_name="__main__")


def test_the_profile_of_own_models_needs_no_dataset(files, monkeypatch, capsys):
    """The note's command, word for word but for the names of the models."""
    profile = RECIPE.with_name("profile_alignment.py")
    argv = ["--teacher", files / "teacher", "--student", files / "student"]
    argv += ["--mode", "structured", "--batch_size", "2", "--seq_length", "100"]
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "argv", [profile.name, *map(str, argv)])
    runpy.run_path(str(profile), run_name="__main__")
    found = json.loads(Path("runs/profile_alignment/profile.json").read_text())
    assert list(found) == ["structured", "structured, fitted"]
    assert all(each["not_finite"] == 0 for each in found.values())
    shape = found["structured"]["shapes"]["k"][0]
    assert shape[0] == 2 and 40 < shape[3] <= 100
    assert "2 rows of sums" in capsys.readouterr().out
