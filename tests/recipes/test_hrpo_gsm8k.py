"""The recipe as a person runs it: small, whole, and with everything one can get wrong."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.recipes.running import holds_no_pickle, run_recipe
from trl_ext.cli.console import PlainConsole
from trl_ext.evaluation import command as evaluation
from trl_ext.tasks import evaluation as task_evaluation
from unsloth_ext import FastThinkingModel, has_thinking
from unsloth_ext.common.wrapping import backbone_of


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
SMALL = shlex.split(
    "--sft_steps 30 --max_steps 2 --eval_size 20 --eval_every 1 "
    "--dry_run_rows 8 --per_device_train_batch_size 16 --save_steps 1 --disable_tqdm true"
)


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *argv: run_recipe(
        monkeypatch, "hrpo_gsm8k.py", *SMALL, "--output_dir", "out", "--cache_dir", tmp_path / "cache", *argv
    )


def test_whole_run_two_stages_and_evaluation(run, monkeypatch, tmp_path, capsys):
    run("--lr_thinking_projection", "0")
    summary = json.loads(Path("out/summary.json").read_text())
    assert {"accuracy_before", "accuracy_after", "n_eval", "steps", "seconds"} <= summary.keys()
    assert summary["n_eval"] == 20 and summary["steps"] == 2 and 0 < summary["seconds"] < 600
    assert Path("out/curves.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "Dry run" in out and "accuracy (95% interval)" in out
    assert holds_no_pickle("out/final")

    (folder,) = (tmp_path / "cache").iterdir()
    made = folder.stat().st_mtime_ns
    run("--lr_thinking_projection", "5e-5", "--max_steps", "4", "--resume_from_checkpoint", "latest")
    assert folder.stat().st_mtime_ns == made, "the warm start is trained once"
    again = json.loads(Path("out/summary.json").read_text())
    assert again["steps"] == 4 and again["accuracy_before"] == summary["accuracy_before"]
    assert again["accuracy_curve"].items() >= summary["accuracy_curve"].items()

    with pytest.raises(ValueError, match=r"no steps left: .* 4 of 4.*--init_from out/checkpoint-4"):
        run("--max_steps", "4", "--resume_from_checkpoint", "checkpoint-4")
    with pytest.raises(ValueError, match=r"out holds run .* finished at step 4"):
        run("--output_dir", "out")
    assert json.loads(Path("out/summary.json").read_text()) == again

    # A second stage: its projection begins at the rate asked for, not somewhere down the first one's cosine
    stage_2 = ["--init_from", "out/final", "--output_dir", "out_2", "--lr_thinking_projection", "5e-5"]
    run(*stage_2, "--lr_scheduler_type", "cosine", "--warmup_steps", "0")
    schedule = json.loads(Path("out_2/checkpoint-1/scheduler.json").read_text())
    assert schedule["last_epoch"] == 1 and 5e-5 in schedule["base_lrs"]
    assert schedule["_last_lr"][schedule["base_lrs"].index(5e-5)] == pytest.approx(
        2.5e-5
    )  # cosine of 2 steps, half way
    assert json.loads(Path("out_2/summary.json").read_text())["accuracy_before"] == again["accuracy_after"]

    evaluation.main(["out/final", "--held_out", "20", "--states", "on", "zero", "off"])
    found = {row["state"]: row for row in json.loads(Path("out/final/eval.json").read_text())["results"]}
    assert found["on"]["accuracy"] == again["accuracy_after"] and found["off"]["latent_share"] == 0

    with pytest.raises(ValueError, match=r"max_seq_length=20: .* and max_completion_length=\d+ may follow"):
        run("--max_seq_length", "20", "--output_dir", "out_3")
    with pytest.raises(ValueError, match=r"max_seq_length=128: .* and max_completion_length=200 may follow"):
        run("--max_completion_length", "200", "--output_dir", "out_3")
    with pytest.raises(ValueError, match=r"max_seq_length=500 is more than .*max_position_embeddings=128"):
        run("--max_completion_length", "200", "--max_seq_length", "500", "--output_dir", "out_3")  # as that one said

    files = sorted(file.name for file in folder.iterdir())  # of the model that the run began with
    evaluation.main([str(folder), "--held_out", "20", "--max_new_tokens", "2"])
    assert [row["state"] for row in json.loads(Path("eval.json").read_text())["results"]] == ["on"]
    assert sorted(file.name for file in folder.iterdir()) == files, "nothing is written into a folder that is not ours"


def test_reachability_as_it_is_shipped_and_resumed(run, monkeypatch, tmp_path, capsys):
    """A whole run with few steps. Resumed half way, it ends with the same model and figures."""

    def train(*argv):
        run("--dataset", "reachability", "--sft_steps", "100", "--max_steps", "4", *argv)
        return json.loads(Path("out/summary.json").read_text()), load_file("out/final/model.safetensors")

    evaluate, states = task_evaluation.evaluate, []

    def watched(*args, thinking, **options):
        states.append(thinking)
        return evaluate(*args, thinking=thinking, **options)

    monkeypatch.setattr(task_evaluation, "evaluate", watched)
    summary, weights = train()
    assert states[-4:] == ["on", "zero", "shuffle", "noise"]
    assert {"zero", "shuffle", "noise"} == summary["ablations"].keys()
    assert all(found["n"] == 20 for found in (summary["before"], summary["after"], *summary["ablations"].values()))
    trained, zeroed = summary["frontier"].values()
    assert (
        len(trained) == 2 and trained[0] == zeroed[0] and trained[1] != zeroed[1]
    )  # no state comes before the first step
    assert all(sum(step.values()) == pytest.approx(1) for steps in summary["frontier"].values() for step in steps)
    assert Path("out/frontier.png").stat().st_size > 5_000 < Path("out/curves.png").stat().st_size
    out = capsys.readouterr().out
    assert "Dry run" in out and "as trained" in out and re.search(r"shuffle .*%", out)
    assert holds_no_pickle("out/final")

    # The whole model was trained, without LoRA, with the shipped settings
    (base,) = (tmp_path / "cache").iterdir()
    start = load_file(base / "model.safetensors")
    moved = {name for name, tensor in start.items() if not (weights[name] == tensor).all()}
    assert any("q_proj" in name for name in moved) and any("embed_tokens" in name for name in moved)
    model, tokenizer = FastThinkingModel.from_pretrained("out/final")
    settings = backbone_of(model).thinking_config
    assert (settings.thinking_source, settings.residual_r_min, settings.residual_r_max) == ("soft_embedding", 0.1, 0.5)
    assert len(tokenizer(" AB CD ? E")["input_ids"]) == 4

    evaluation.main(["out/final", "--tasks", "reachability", "--held_out", "20", "--states", "on", "zero"])
    found = json.loads(Path("out/final/eval.json").read_text())["results"]
    assert [row["accuracy"] for row in found] == [summary["accuracy_after"], summary["ablations"]["zero"]["accuracy"]]

    Path("out/final").rename("whole")  # `weights` may still be read from its file
    again, resumed = train("--resume_from_checkpoint", "checkpoint-2")
    assert resumed.keys() == weights.keys() and all((resumed[name] == weights[name]).all() for name in weights)
    for figures in ("before", "after", "accuracy_curve", "ablations", "frontier"):
        assert again[figures] == summary[figures]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--no_such_flag", "1"], "no_such_flag"),
        (["--group_size", "7"], "num_generations"),
        (["--recompute", "sometimes"], "recompute='sometimes'"),
        (["--answer_delimiter", "§"], "cannot produce"),
        (["--model_name", "smollm2", "--dataset", "none.jsonl"], "no such file"),
        (["--dataset_options", "max_terms: 2"], "is not JSON"),
        (["--dataset_options", "[2]"], "a JSON object"),
        (["--dataset_options", '{"max_terms": 2}'], "dataset=tiny is not a reasoning-gym generator"),
        (["--resume_from_checkpoint", "nowhere"], "no such folder"),
        (["--resume_from_checkpoint", "latest"], "no complete checkpoint"),
    ],
)
def test_what_is_wrong_is_said_before_training(run, capsys, argv, message):
    with pytest.raises((ValueError, SystemExit)) as error:
        run(*argv)
    assert message in str(error.value) + capsys.readouterr().err
    assert not list(Path().glob("out/checkpoint-*"))


def test_a_missing_vllm_is_said_before_anything_is_made(run, monkeypatch):
    monkeypatch.setattr("unsloth_ext.common.vllm_installed.installed_version", lambda _: None)
    with pytest.raises(ImportError, match=r"use_vllm=True: vLLM is not installed\. Run: pip install"):
        run("--use_vllm")
    assert not list(Path().iterdir())


def test_a_generator_takes_its_options_from_the_command_line(monkeypatch):
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    argv = ["--model_name", "tiny", "--dataset", "chain_sum", "--dataset_options", json.dumps(options)]
    monkeypatch.setattr(sys, "argv", ["x", *argv])
    _, data, _ = runpy.run_path(str(RECIPES / "hrpo_gsm8k.py"), run_name="recipe")["parse"]()
    questions = [row["question"] for row in data.rows(split="train", size=20, seed=0)]
    assert all(len(re.findall(r"\d+", question)) == 2 for question in questions), questions[0]


def test_an_adapter_goes_on_as_it_is(monkeypatch, tmp_path, capsys):
    """With its own LoRA and new thinking modules; a second adapter around it would be refused."""
    tiny.model().save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    net = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), LoraConfig(r=2, task_type="CAUSAL_LM")
    )
    net.save_pretrained(tmp_path / "adapter")
    argv = [
        "--model_name",
        str(tmp_path / "adapter"),
        "--use_cpu",
        "true",
        "--bf16",
        "false",
        "--max_seq_length",
        "256",
    ]
    monkeypatch.setattr(sys, "argv", ["hrpo_gsm8k.py", *argv])
    recipe = runpy.run_path(str(RECIPES / "hrpo_gsm8k.py"))
    script, data, args = recipe["parse"]()
    model, _ = recipe["load_model"](script, data, args, PlainConsole())
    assert model.peft_config["default"].r == 2 and has_thinking(model)
    assert "adapter is an adapter: its LoRA" in capsys.readouterr().out.replace("\n", " ")


def test_group_size_is_another_name_for_num_generations(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["x", "--group_size", "4"])
    names = runpy.run_path(str(RECIPES / "hrpo_gsm8k.py"), run_name="recipe")
    script, _, args = names["parse"]()
    assert args.num_generations == 4 and script.model_name == "tiny"


@pytest.mark.parametrize("config", sorted((RECIPES / "configs").glob("hrpo_*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_names_its_command(config, monkeypatch):
    assert config.read_text().startswith(("# python recipes/", "# make "))
    extra = ["--bf16", "false", "--use_cpu", "true"]  # this machine may have no GPU
    monkeypatch.setattr(sys, "argv", ["x", "--config", str(config), *extra])
    names = runpy.run_path(str(RECIPES / "hrpo_gsm8k.py"), run_name="recipe")
    names["parse"]()


def test_the_papers_defaults(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["x", "--model_name", "Qwen/Qwen2.5-1.5B-Instruct", "--bf16", "false", "--use_cpu", "true"]
    )
    script, _, args = runpy.run_path(str(RECIPES / "hrpo_gsm8k.py"), run_name="recipe")["parse"]()
    assert (script.lora_r, script.lora_alpha, args.learning_rate, args.beta) == (32, 64, 5e-6, 0.005)
    assert (args.adam_beta1, args.adam_beta2, args.weight_decay, args.max_grad_norm) == (0.9, 0.99, 0.1, 0.1)
    assert (args.num_generations, args.temperature, args.max_completion_length) == (4, 0.5, 1024)
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (8, 4)
    assert (args.residual_r_min, args.residual_r_max, args.num_train_epochs) == (0.99, 0.999, 1)
    assert (args.lr_residual_gate, args.lr_residual_lambda, args.lr_thinking_projection) == (1e-4, 1e-3, 1e-4)
    assert args.warmup_steps == 0.1 and args.lr_scheduler_type == "cosine"
    assert args.optim == "paged_adamw_8bit"
