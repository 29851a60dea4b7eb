"""The recipe of GRPO after latent tokens as a person runs it: small, whole, and with everything one can get wrong."""

import json
import shlex
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests import tiny
from tests.recipes.running import RECIPES, holds_no_pickle, run_recipe
from tests.trl_ext.latent.setups import thinking_folder
from trl_ext.tasks import equations
from unsloth_ext import LatentModel
from unsloth_ext.latent.config import with_latent_modules


SMALL = shlex.split(
    "--sft_steps 30 --codi_steps 3 --max_steps 2 --eval_size 12 --eval_every 1 --dry_run_rows 8 --save_steps 1 "
    "--per_device_train_batch_size 16 --disable_tqdm true --logging_steps 1 --output_dir out"
)
OWN = shlex.split("--model_name thinks --dataset rows.jsonl --eval_size 4")


@pytest.fixture
def run(monkeypatch, tmp_path, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(equations, "SMALL", equations.Size(rows=1000))
    config = RECIPES / "configs" / "latent_grpo_tiny.yaml"
    return lambda *argv: run_recipe(
        monkeypatch, "latent_grpo.py", "--config", config, *SMALL, "--cache_dir", cache, *argv
    )


@pytest.fixture
def files(tmp_path):
    """Models and rows of one's own."""
    thinking_folder(tmp_path)
    plain = tmp_path / "plain"
    tiny.model().save_pretrained(plain)
    tiny.tokenizer(()).save_pretrained(plain)
    rows = [{"question": f"{a}+{b}=", "answer": str(a + b)} for a in range(6) for b in range(6)]
    lines = [*rows, {"question": "1+1="}, {"question": "1+1=", "answer": "two"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    (tmp_path / "bare.jsonl").write_text(json.dumps({"question": "1+1="}) + "\n")
    long = {"question": "1+" * 400 + "1=", "answer": "401"}
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in (*rows, long, *rows[:4])))


def test_whole_run_resume_and_a_closer_look(run, monkeypatch, capsys, cache):
    run()
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["steps"] == 2 and summary["n_eval"] == 12
    assert set(summary["accuracy_curve"]) == {"0", "1", "2"}
    assert Path("out/curves.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "Dry run on 8 sampled completions" in out and "1,000 of 1,000 rows usable" in out
    assert list(summary["results"]) == [
        "latent tokens",
        *(f"latent tokens: {name}" for name in ("zero", "shuffle", "noise", "interpolate")),
    ]
    assert all(before["n"] == after["n"] == 12 for before, after in summary["results"].values())
    assert holds_no_pickle("out/final")
    made = {folder: folder.stat().st_mtime_ns for folder in cache.iterdir()}
    assert sorted(folder.name.rpartition("-")[0] for folder in made) == ["tiny-latents", "tiny-steps"]

    run("--max_steps", "3", "--resume_from_checkpoint", "latest")
    assert {folder: folder.stat().st_mtime_ns for folder in cache.iterdir()} == made, "the warm start is trained once"
    again = json.loads(Path("out/summary.json").read_text())
    assert again["steps"] == 3 and again["accuracy_curve"].items() >= summary["accuracy_curve"].items()
    assert again["results"]["latent tokens"][0] == summary["results"]["latent tokens"][0]

    look = ("--checkpoint", "out/final", "--held_out", "12", "--latents", "on", "zero", "--max_new_tokens", "4")
    run_recipe(monkeypatch, "eval_latent.py", *look)
    found = json.loads(Path("out/final/eval.json").read_text())["latents"]
    assert found["on"]["accuracy"] == again["accuracy_after"]
    assert found["zero"]["accuracy"] == again["results"]["latent tokens: zero"][1]["accuracy"]


@pytest.mark.parametrize("adapter", [False, True])
def test_a_model_and_rows_of_ones_own(run, files, capsys, adapter):
    """What is unusable is counted, the last four are held out, and rows need no steps."""
    if adapter:
        thinks = LatentModel.from_pretrained("thinks")
        lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        vars(lora).update(with_latent_modules(lora, thinks.model))
        torch.manual_seed(0)
        LatentModel(get_peft_model(thinks.model, lora), thinks.tokenizer).save_pretrained("adapter")
    name = "adapter" if adapter else "thinks"
    run(*OWN, "--model_name", name, "--lora_r", "4" if adapter else "0", "--learning_rate", "1e-2")
    said = capsys.readouterr().out.replace("\n", " ")
    assert "32 of 38 rows usable" in said and "answer is not a text" in said and "not one number in the answer" in said
    assert ("adapter is an adapter: it is trained further" in said) == adapter
    file = "adapter_model.safetensors" if adapter else "model.safetensors"
    before, after = (load_file(Path(folder, file)) for folder in (name, "out/final"))
    assert before.keys() == after.keys()
    assert any("latent_projection" in key for key in before)
    assert all(before[key].shape == after[key].shape for key in before)  # an adapter keeps its rank


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            [*OWN, "--model_name", "plain"],
            "plain has no settings of the method latent: it was not saved by its trainer",
        ),
        ([*OWN, "--model_name", "think"], "there is no folder think in "),
        ([*OWN, "--dataset", "bare.jsonl"], "has the columns question, but it needs question and answer"),
        ([*OWN, "--dataset", "none.jsonl"], "none.jsonl: there is no such file"),
        ([*OWN, "--eval_size", "40"], "leaves none to train on"),
        ([*OWN, "--dataset", "long.jsonl"], "prompt 32 has 802 tokens, 5 positions of the model's own and up to 4 new"),
        (
            [*OWN, "--per_device_train_batch_size", "1000"],
            "train_dataset has 32 rows, but a rollout needs 125 different",
        ),
        (["--num_generations", "7"], "num_generations"),
        (["--use_vllm", "true"], "use_vllm=True: latent tokens are made by transformers"),
        (["--gradient_checkpointing", "true"], "gradient_checkpointing=True: transformers drops the cache with it"),
        (["--resume_from_checkpoint", "latest"], "no complete checkpoint"),
    ],
)
def test_what_is_wrong_is_said_before_training(run, files, capsys, argv, message):
    with pytest.raises((ValueError, SystemExit, OSError)) as error:
        run(*argv)
    assert message in str(error.value) + capsys.readouterr().err
    assert not list(Path().glob("out/checkpoint-*"))
