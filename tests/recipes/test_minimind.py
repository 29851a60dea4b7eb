"""The stages, one after the other, tiny: each is run as a person runs it and leaves what the next one begins with."""

import importlib.util
import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.marks import slow
from tests.trl_ext.minimind import setups
from trl_ext.common.rollout_diagnostics import RolloutDiagnostics
from trl_ext.minimind import embedded, rl, stage
from trl_ext.minimind.chat import Dialogue
from trl_ext.minimind.report import STAGES


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "minimind"
FEW = {
    "pretrain": ["--max_steps", "3", "--per_device_train_batch_size", "4", "--max_length", "64"],
    "sft": ["--max_steps", "2", "--per_device_train_batch_size", "8"],
    "lora": ["--max_steps", "2", "--per_device_train_batch_size", "8"],
    "dpo": ["--max_steps", "2", "--per_device_train_batch_size", "4"],
    "ppo": ["--max_steps", "4", "--per_device_train_batch_size", "8", "--max_completion_length", "8"],
    "grpo": ["--max_steps", "2", "--per_device_train_batch_size", "8", "--num_generations", "4"],
    "spo": ["--max_steps", "2", "--per_device_train_batch_size", "8"],
    "distill": ["--max_steps", "2", "--per_device_train_batch_size", "8"],
    "reason": ["--max_steps", "2", "--per_device_train_batch_size", "8"],
}
QUIET = ["--disable_tqdm", "true", "--eval_size", "6", "--logging_steps", "1"]


def module(name):
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", RECIPES / f"{name}.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All stages and the report, in one folder."""
    folder = tmp_path_factory.mktemp("run")
    patch = pytest.MonkeyPatch()
    patch.setattr(
        stage,
        "write_embedded",
        lambda target, seed: embedded.write_embedded(
            target, seed, embedded.Sizes(pretrain=60, sft=60, lora=40, dpo=40, rl=60, reason=40, held_out=8)
        ),
    )
    patch.setattr("trl_ext.minimind.report.DIALOGUES", {"sft": ("What is 7+5-3?",)})
    try:
        for name in STAGES:
            run(patch, folder, name, [] if name == "tokenizer" else [*FEW[name], *QUIET])
        patch.setattr(sys, "argv", ["report.py", "--run_dir", str(folder)])
        module("report").main()
    finally:
        patch.undo()
    return folder


def arguments(folder, name):
    """Flags that take a stage's configuration to another folder."""
    config = yaml.safe_load((RECIPES / "configs" / f"{name}_tiny.yaml").read_text())
    moved = {k: v.replace("runs/minimind", str(folder)) for k, v in config.items() if "runs/minimind" in str(v)}
    return [part for key, value in moved.items() for part in (f"--{key}", value)]


def run(patch, folder, name, flags):
    patch.setattr(sys, "argv", [f"{name}.py", *arguments(folder, name), *flags])
    module(name).main()


def test_every_stage_leaves_a_model_a_summary_and_a_picture(whole):
    for name in STAGES:
        summary = json.loads((whole / name / "summary.json").read_text())
        assert summary["stage"] == name and summary["before"].keys() == summary["after"].keys()
        assert 0 <= summary["seconds"] < 600
        if name not in ("tokenizer", "lora"):
            loaded = AutoModelForCausalLM.from_pretrained(whole / name / "final")
            assert loaded.num_parameters() > 1e6 and (whole / name / "curves.png").stat().st_size > 10_000
        assert len(AutoTokenizer.from_pretrained(whole / name / "final")) > 259
    assert (whole / "lora" / "final" / "adapter_model.safetensors").exists()
    assert (whole / "ppo" / "final" / "critic" / "model.safetensors").exists()
    assert len(AutoTokenizer.from_pretrained(whole / "reason" / "final")("<think>")["input_ids"]) == 1


def test_the_report_holds_every_stage_and_a_dialogue(whole):
    report = json.loads((whole / "report.json").read_text())
    assert list(report["stages"]) == list(STAGES)
    assert [turn["role"] for turn in report["dialogues"]["sft"]] == ["user", "assistant"]
    assert (whole / "report.png").stat().st_size > 20_000


IN_THEIR_OWN_TESTS = ("sft", "lora", "dpo", "grpo", "spo", "ppo", "distill", "reason")  # or as pretraining does


@pytest.mark.parametrize("name", ["pretrain", *(slow(name) for name in IN_THEIR_OWN_TESTS)])
def test_a_stage_resumes_as_if_it_had_not_stopped(whole, monkeypatch, tmp_path, name):
    """Weights after 4 steps, bit for bit, and after 2, a checkpoint, and 2 more; and the held-out metric of each step."""
    few = [*FEW[name], *QUIET, "--max_steps", "4", "--save_strategy", "steps", "--save_steps", "2", "--eval_every", "1"]
    ends = []
    for resume in ([], ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2")]):
        run(monkeypatch, whole, name, [*few, "--output_dir", str(tmp_path / "out"), *resume])
        file = "adapter_model.safetensors" if name == "lora" else "model.safetensors"
        summary = json.loads((tmp_path / "out" / "summary.json").read_text())
        curve, metric = summary["curve"], summary["curve_of"]
        assert list(curve) == ["0", "1", "2", "3", "4"] and curve["4"] == summary["after"][metric]
        ends.append(((tmp_path / "out" / "final" / file).read_bytes(), curve))
    assert ends[0] == ends[1]
    kinds = {file.suffix for file in (tmp_path / "out").rglob("*") if file.is_file()}
    assert kinds <= {".safetensors", ".json", ".md", ".jinja", ".png", ".parquet", ".lock"}


@pytest.mark.slow
def test_cispo_is_a_flag_of_grpo(whole, monkeypatch, tmp_path):
    run(
        monkeypatch,
        whole,
        "grpo",
        [*FEW["grpo"], *QUIET, "--loss_type", "cispo", "--epsilon_high", "5.0", "--output_dir", str(tmp_path)],
    )
    assert json.loads((tmp_path / "summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize("name", ["ppo", "grpo", "spo"])
def test_reinforcement_says_once_when_nothing_can_be_learnt(whole, monkeypatch, tmp_path, name):
    made = []
    monkeypatch.setattr(stage, "run", lambda recipe, stage, args, make, measures, **_: made.append(make()))
    run(monkeypatch, whole, name, [*FEW[name], *QUIET, "--output_dir", str(tmp_path)])
    callbacks = made[0].callback_handler.callbacks
    assert sum(isinstance(callback, RolloutDiagnostics) for callback in callbacks) == 1


def test_own_files_are_split_and_a_bad_row_is_named(whole, monkeypatch, tmp_path):
    file = tmp_path / "mine.jsonl"
    rows = [{"conversations": setups.turns(f"{i}?", str(i))} for i in range(20)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = [*FEW["sft"], *QUIET, "--output_dir", str(tmp_path / "out"), "--dataset", str(file)]
    run(monkeypatch, whole, "sft", own)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["before"].keys() == {"response loss"}
    file.write_text(file.read_text() + json.dumps({"conversations": setups.turns("7?", "")}) + "\n")
    own.append("--overwrite")
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 21, conversations\[1\]\.content: is empty"):
        run(monkeypatch, whole, "sft", own)
    with pytest.raises(ValueError, match="eval_size=300 are held out"):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        run(monkeypatch, whole, "sft", [*own, "--eval_size", "300"])


@pytest.mark.slow
def test_the_dialogue(whole):
    """What is typed, in a process of its own."""
    model = str(whole / "sft" / "final")
    command = [sys.executable, str(RECIPES / "chat.py"), "--model_name", model, "--max_new_tokens", "8"]
    turns = ("Hello!", "What is 7+5?")
    typed = subprocess.run(command, input="\n".join(turns), capture_output=True, text=True, check=True, cwd=ROOT)
    talk = Dialogue(*stage.load_model(model), max_new_tokens=8)
    found = re.findall(r"user: (.*)\nassistant: ([^\0]*?)(?=user: |\Z)", typed.stdout)
    assert [(said, answer.strip()) for said, answer in found] == [(said, talk.say(said).strip()) for said in turns]


def test_what_is_said_on_the_command_line(whole, monkeypatch, capsys):
    argv = ["chat.py", "--model_name", str(whole / "sft" / "final"), "--max_new_tokens", "8", "--say", "Hello!", "7+5?"]
    monkeypatch.setattr(sys, "argv", argv)
    module("chat").main()
    said = capsys.readouterr().out
    assert said.index("user: Hello!") < said.index("user: 7+5?") and said.count("assistant: ") == 2


def test_a_stage_runs_what_it_needs_first(tmp_path, monkeypatch):
    """Nothing is there: the recipe of the stage before is run, which here says so and stops."""
    commands = []

    class Done:
        returncode = 3

    monkeypatch.setattr(stage.subprocess, "run", lambda command, check: commands.append(command) or Done)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["dpo.py"])
    with pytest.raises(SystemExit) as stopped:
        module("dpo").main()
    assert stopped.value.code == 3 and commands == [[sys.executable, str(RECIPES / "sft.py")]]
    Done.returncode = 0
    for flags in ([], ["--dataset", "mine.jsonl"], ["--run_dir", "elsewhere", "--model_name", "elsewhere/sft/final"]):
        monkeypatch.setattr(sys, "argv", ["dpo.py", *flags])
        with pytest.raises(ValueError, match=r"there is no such folder; run recipes/minimind/sft\.py first"):
            module("dpo").main()
    assert len(commands) == 2  # not for one's own data, nor elsewhere


@pytest.mark.parametrize("config", sorted((RECIPES / "configs").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_config_loads_and_names_its_command(config, monkeypatch):
    """Also where the machine has neither its data nor a GPU: nothing but flags is looked at."""
    name = config.stem.removesuffix("_tiny")
    text = config.read_text()
    assert config.stem == name or f"recipes/minimind/{name}.py" in text.splitlines()[0]
    recipe, found = module(name), []
    monkeypatch.setattr(stage, "_ensure", lambda *_: None)
    monkeypatch.setattr(stage, "start", lambda *_: None)
    parent = stage.parse

    class Parsed(Exception):
        pass

    def parse(*args):
        found.extend(parent(*args))
        raise Parsed

    monkeypatch.setattr(recipe if hasattr(recipe, "parse") else rl, "parse", parse)
    cpu = ["--use_cpu", "true", "--bf16", "false"] if "bf16: true" in text else []
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--config", str(config), *cpu])
    with pytest.raises(Parsed):
        recipe.main()
    known = {field.name for parsed in found for field in fields(parsed)}
    assert set(yaml.safe_load(text)) <= known


def test_unknown_flags_and_missing_configs_end_before_anything_is_loaded(monkeypatch):
    with pytest.raises(ValueError, match="learning_raet"):
        run(monkeypatch, Path("runs/minimind"), "tokenizer", ["--learning_raet", "1"])
    with pytest.raises(ValueError, match=r"nope\.yaml: there is no such file"):
        run(monkeypatch, Path("runs/minimind"), "tokenizer", ["--config", "nope.yaml"])
