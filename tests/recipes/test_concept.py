"""The recipes for concept tokens as a person runs them: small, whole, and with what one can get wrong."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests import tiny
from tests.marks import slow
from tests.recipes.running import holds_no_pickle, run_recipe
from tests.trl_ext.concept import setups
from trl_ext.tasks import facts
from unsloth_ext import ConceptModel


RECIPES = Path(__file__).parents[2] / "recipes"
SMALL = shlex.split(
    "--base_steps 5 --max_steps 2 --eval_size 12 --eval_every 1 "
    "--disable_tqdm true --per_device_train_batch_size 8 --save_steps 1 --logging_steps 1"
)


@pytest.fixture
def run(monkeypatch, tmp_path, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(facts, "SMALL", facts.Size(facts=3, fillers=2, rows=400, layers=4, width=32))

    def start(recipe, *argv):
        run_recipe(monkeypatch, f"{recipe}.py", *SMALL, *argv)

    return lambda recipe, *argv: start(recipe, "--output_dir", "out", "--cache_dir", cache, *argv)


def summary(folder="out"):
    return json.loads(Path(folder, "summary.json").read_text())


def test_whole_run_resume_and_what_it_leaves(run, capsys):
    run("concept_v2")
    first = summary()
    assert first["steps"] == 2 and first["n_eval"] == 12 and set(first["accuracy_curve"]) == {"0", "1", "2"}
    assert first["base"]["ratio"] is None and first["after"]["ratio"] >= 1 and 0 < first["after"]["macs"] < 3
    shown = capsys.readouterr().out
    assert "without concepts, before" in shown and "tokens per concept" in shown and "with random concepts" in shown
    assert Path("out/curves.png").stat().st_size > 10_000
    assert holds_no_pickle("out/final")
    page = Path("out/concepts.html").read_text()
    held_out = facts.split(12, 0)[1]
    plain = re.sub(r"<sub>[\d ]+</sub>|<[^>]+>", "", page)
    loaded = ConceptModel.from_pretrained("out/final")
    for row in held_out:
        text = row["prompt"] + row["completion"]
        pieces = loaded.segments(text)
        assert "".join(piece for piece, _ in pieces).replace(" ", "") == text.replace(" ", "")
        assert text.replace(" ", "") in plain.replace(" ", "")
    assert page.count("<sub>") == sum(
        bool(codes) for row in held_out for _, codes in loaded.segments(row["prompt"] + row["completion"])
    )
    run("concept_v2", "--max_steps", "3", "--resume_from_checkpoint", "latest")
    assert summary()["steps"] == 3 and summary()["accuracy_before"] == first["accuracy_before"]
    assert summary()["accuracy_curve"].items() >= first["accuracy_curve"].items()


def test_flags_win_over_the_preset_and_the_preset_over_no_flags():
    from trl_ext.concept.recipe import ScriptArguments, parse

    found = [
        parse(flags, ScriptArguments, RECIPES / "configs")[2]
        for flags in ([], ["--calibrate_null", "false", "--gate", "literal"], ["--preset", "literal"])
    ]
    assert [(a.gate, a.calibrate_null, a.ratio_weight, a.codebook_init) for a in found] == [
        ("factorised", True, 1.0, "kmeans"),
        ("literal", False, 1.0, "kmeans"),
        ("literal", False, 0.0, "random"),
    ]
    with pytest.raises(ValueError, match="no preset 'best'"):
        parse(["--preset", "best"], ScriptArguments, RECIPES / "configs")


@pytest.mark.parametrize("config", sorted((RECIPES / "configs").glob("concept_*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_names_its_command(config, monkeypatch):
    from trl_ext.concept.recipe import ScriptArguments, parse

    assert config.read_text().startswith(("# python recipes/concept_v2.py", "# make train-concept"))
    # This machine may have no GPU
    flags = ["--config", str(config), "--bf16", "false", "--use_cpu", "true"]
    script, _, args = parse(flags, ScriptArguments, config.parent)
    assert script.preset == "stable" and args.codebook_init == "kmeans"
    assert script.model_name == {"concept_gsm8k": "Qwen/Qwen3-0.6B"}.get(config.stem, config.stem.split("_")[1])


@pytest.mark.slow
def test_the_baselines_train_beside_each_other(run, capsys):
    run("concept_v1")
    lora, fixed = summary("out/lora"), summary("out/fixed")
    assert lora["after"]["ratio"] is None and fixed["after"]["ratio"] == 4.0
    assert lora["base"] == fixed["base"] and "\nTraining fixed\n" in capsys.readouterr().out
    assert Path("out/fixed/concepts.html").exists() and not Path("out/lora/concepts.html").exists()
    with pytest.raises(ValueError, match="name one run with --baseline"):
        run("concept_v1", "--resume_from_checkpoint", "latest")
    run("concept_v1", "--baseline", "fixed", "--stride", "7", "--concepts_per_stride", "2", "--output_dir", "alone")
    assert summary("alone")["after"]["ratio"] == 3.5
    with pytest.raises(ValueError, match="baseline='none'"):
        run("concept_v1", "--baseline", "none")


@pytest.fixture
def files(tmp_path):
    """A model's folder, and GSM8K-like rows."""
    tokenizer = tiny.tokenizer(())
    setups.base().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"question": f"{a} and {a}?", "answer": f"{a}+{a}={2 * a}\n#### {2 * a}"} for a in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


@pytest.mark.parametrize("chat", [slow(False), True])
def test_a_model_and_data_of_ones_own(run, files, chat):
    if chat:
        tokenizer = tiny.tokenizer(())
        tokenizer.chat_template = (
            "{% for m in messages %}{{ m.role }} {{ m.content }}<eos>{% endfor %}"
            "{% if add_generation_prompt %}assistant {% endif %}"
        )
        tokenizer.save_pretrained(files / "model")
    config = files / "own.yaml"
    own = {
        "model_name": files / "model",
        "dataset": files / "rows.jsonl",
        "max_new_tokens": 6,
        "lora_r": 4,
        "n_shallow": 1,
        "n_deep": 1,
        "num_concepts": 16,
        "use_cpu": "true",
        "bf16": "false",
        "preset": "stable",
        "eval_strategy": "steps",
        "eval_steps": 1,
        "report_to": "none",
    }
    config.write_text("\n".join(f"{k}: {v}" for k, v in own.items()))
    run("concept_v2", "--config", config)
    assert summary()["n_eval"] == 12 and summary()["after"]["nll"] > 0
    assert json.loads(Path("out/final/latent_reasoning.json").read_text())["settings"]["num_concepts"] == 16


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--segmenter", "words"), "segmenter='words'"),
        (("--n_shallow", "9"), "n_shallow=9"),
        (("--model_name", "tiny", "--dataset", "rows.jsonl"), "can only be used together"),
        (("--resume_from_checkpoint", "latest"), "no complete checkpoint"),
    ],
)
def test_wrong_flags_end_before_training(run, flags, message):
    with pytest.raises((SystemExit, ValueError), match=message):
        run("concept_v2", *flags)
    assert not list(Path().glob("out/checkpoint-*"))
