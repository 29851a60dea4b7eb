"""The recipes of latent distillation as a person runs them: small, whole, and with everything one can get wrong."""

import json
import runpy
import shlex
from pathlib import Path

import pytest

from tests import tiny
from tests.marks import slow
from tests.recipes.running import holds_no_pickle, run_recipe
from trl_ext.latent.config import LatentArguments
from trl_ext.tasks import equations


ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes"
METHODS = ("codi", "pccot", "kava", "lotus", "coconut")
SMALL = shlex.split(
    "--sft_steps 30 --max_steps 2 --eval_size 12 --eval_every 1 "
    "--disable_tqdm true --per_device_train_batch_size 8 --save_steps 1 --logging_steps 1"
)


@pytest.fixture
def run(monkeypatch, tmp_path, cache):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(equations, "SMALL", equations.Size(rows=1000))
    return lambda method, *argv: run_recipe(
        monkeypatch, f"{method}_gsm8k.py", *SMALL, "--output_dir", "out", "--cache_dir", cache, *argv
    )


@pytest.mark.parametrize(
    "flags, term",
    [
        ("--w_step_decoder 1", "loss/step_decoder"),
        ("--latents_per_step 2 --latent_ce_tokens results", "loss/latent_ce"),
    ],
)
def test_terms_that_need_more_of_a_row_than_its_tokens(run, flags, term):
    run("codi", *flags.split(), "--max_steps", "1", "--eval_every", "0")
    log = json.loads(Path("out/checkpoint-1/trainer_state.json").read_text())["log_history"]
    assert any(term in entry for entry in log)


@pytest.mark.parametrize("method", [slow("codi"), slow("pccot"), "kava", slow("lotus"), slow("coconut")])
def test_whole_run_resume_and_a_closer_look(run, monkeypatch, capsys, method, cache):
    run(method)
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["method"] == method and summary["steps"] == 2 and summary["n_eval"] == 12
    assert set(summary["accuracy_curve"]) == {"0", "1", "2"}
    assert Path("out/curves.png").stat().st_size > 10_000
    out = capsys.readouterr().out
    assert "1,000 of 1,000 rows usable" in out and "explicit steps" in out and "noise" in out
    assert holds_no_pickle("out/final")
    made = {folder: folder.stat().st_mtime_ns for folder in cache.iterdir()}

    run(method, "--max_steps", "3", "--resume_from_checkpoint", "latest")
    assert {folder: folder.stat().st_mtime_ns for folder in cache.iterdir()} == made, "the warm start is trained once"
    again = json.loads(Path("out/summary.json").read_text())
    assert again["steps"] == 3 and again["accuracy_before"] == summary["accuracy_before"]
    assert again["accuracy_curve"].items() >= summary["accuracy_curve"].items()

    run_recipe(
        monkeypatch, "eval_latent.py", "--checkpoint", "out/final", "--held_out", "12", "--show", "1", "--batch_size", 5
    )
    found = json.loads(Path("out/final/eval.json").read_text())
    assert found["latents"]["on"]["accuracy"] == again["accuracy_after"]
    assert len(found["num_latents"]) == (
        2 if method == "coconut" else 4
    )  # it is in its first stage, of two latent tokens
    assert 0 <= found["probe"]["found"] <= 1
    assert Path("out/final/latent.png").stat().st_size > 10_000
    Path("one.jsonl").write_text(json.dumps({"question": "1+2=", "steps": ["1+2=3"], "answer": "3"}) + "\n")
    how = ("--max_new_tokens", "4", "--num_latents", "2", "--latents", "on", "--output", "one")
    run_recipe(monkeypatch, "eval_latent.py", "--checkpoint", "out/final", "--dataset", "one.jsonl", *how)
    assert Path("one/eval.json").exists() and not Path("one/latent.png").exists()  # steps without the last one: none


def test_the_loss_on_held_out_rows_on_request(run, capsys):
    run("pccot", "--eval_strategy", "steps", "--eval_steps", "1")
    assert "eval_loss/codi" in capsys.readouterr().out


@pytest.fixture
def files(tmp_path):
    """A base model's folder and rows in a file, some of them unusable."""
    tokenizer = tiny.tokenizer(())
    tiny.model("llama").save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lines = [
        f"{a} and {b}||<<{a}+{b}={a + b}>> <<{a + b}+1={a + b + 1}>> #### {a + b + 1}"
        for a in range(9)
        for b in range(3)
    ]
    lines += ["no bars", "q||<<1=1>> #### none", f"{'long ' * 40}||<<1=1>> <<1=1>> #### 1"]
    (tmp_path / "rows.txt").write_text("\n".join(lines) + "\n")
    held = [{"question": f"{a} and 9", "answer": f"so\n#### {a + 10}"} for a in range(4)]
    held.append({"question": "1 and 2", "answer": "so\n#### 4"})  # a training question
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    (tmp_path / "bad.txt").write_text("no bars\n")
    (tmp_path / "all.txt").write_text("1 and 2||<<1+2=3>> #### 3\n")
    (tmp_path / "same.txt").write_text("1 and 2||<<1+2=3>> #### 3\n" * 9)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "rows.csv").write_text("question,answer\n")
    (tmp_path / "list.yaml").write_text("- a\n")
    (tmp_path / "cut.yaml").write_text("a: [1\n")
    return tmp_path


def test_a_model_and_files_of_ones_own(run, files, capsys):
    """What is unusable is counted; held-out rows need no steps; held-out questions leave the training rows."""
    run(
        "kava",
        "--model_name",
        "base",
        "--dataset",
        "rows.txt",
        "--eval_dataset",
        "held.jsonl",
        "--max_length",
        "100",
        "--config",
        RECIPES / "configs/kava_tiny.yaml",
        "--num_latents",
        "9",
        "--kv_scorer",
        "rkv",
    )
    summary = json.loads(Path("out/summary.json").read_text())
    assert summary["n_eval"] == 5
    for line in ("26 of 30 rows usable", "no '||'", "not one number after '####'", "more tokens than max_length=100"):
        assert line in summary["data"], summary["data"]
    assert "1 training rows are held-out questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--no_such_flag", "1"], "no_such_flag"),
        (["--num_latents", "0"], "num_latents=0"),
        (["--kv_scorer", "best"], "kv_scorer='best'"),
        (["--kv_scorer", "rkv", "--num_latents", "8"], "num_latents=8"),
        (["--packing", "true"], "packing=True"),
        (["--gradient_checkpointing", "true"], "gradient_checkpointing=True"),
        (["--preset", "none-such"], "no preset 'none-such'"),
        (["--config", "none.yaml"], "none.yaml"),
        (["--dataset", "rows.txt"], "can only be used together"),
        (["--model_name", "base", "--dataset", "none.txt"], "no such file"),
        (["--model_name", "base", "--dataset", "bad.txt"], "0 of 1 rows usable"),
        (["--model_name", "base", "--dataset", "rows.txt", "--eval_size", "40"], "leaves none to train on"),
        (["--model_name", "base", "--dataset", "rows.txt", "--max_length", "5"], "more tokens than max_length=5"),
        (["--preset=none-such"], "no preset 'none-such'"),
        (["--config", "list.yaml"], "list.yaml: does not consist of `field: value` lines"),
        (["--config", "cut.yaml"], "cut.yaml: "),
        (["--w_codi", "nan"], "w_codi=nan"),
        (["--eval_size", "0"], "eval_size=0"),
        (["--eval_size", "200000"], "200000 held-out equations"),
        (["--eval_batch", "0"], "eval_batch=0"),
        (["--model_name", "base", "--dataset", "rows.csv"], "name a .jsonl, .json, .parquet, .txt file"),
        (["--model_name", "base", "--dataset", "empty.jsonl"], "empty.jsonl: the file is empty"),
        (["--model_name", "base", "--dataset", "all.txt", "--eval_dataset", "all.txt"], "no row is left to train on"),
        (
            ["--model_name", "base", "--dataset", "same.txt", "--eval_size", "4"],
            "held out in its last rows: no row is left to train",
        ),
        (["--model_name", "base", "--dataset", ""], "the dataset's name is empty"),
        (["--resume_from_checkpoint", "nowhere"], "no such folder"),
        (["--resume_from_checkpoint", "latest"], "no complete checkpoint"),
    ],
)
def test_what_is_wrong_is_said_before_training(run, files, capsys, argv, message):
    config = [] if "--config" in argv else ["--config", RECIPES / "configs/kava_tiny.yaml"]
    with pytest.raises((ValueError, SystemExit, OSError)) as error:
        run("kava", *config, *argv)
    assert message in str(error.value) + capsys.readouterr().err
    assert not list(Path().glob("out/checkpoint-*"))


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--checkpoint", "base"], "no settings of the method latent"),
        (["--checkpoint", "base", "--latents", "half"], "choose from on"),
        (["--checkpoint", "base", "--dataset", "bad.txt"], "0 of 1 rows usable"),
        (["--checkpoint", "base", "--held_out", "0"], "0 held-out equations"),
        (["--checkpoint", "base", "--limit", "0"], "limit=0"),
        (["--checkpoint", "base", "--batch_size", "0"], "batch_size=0"),
        ([], "--checkpoint"),
    ],
)
def test_what_is_wrong_with_a_closer_look(files, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(files)
    with pytest.raises((ValueError, SystemExit)) as error:
        run_recipe(monkeypatch, "eval_latent.py", *argv)
    assert message in str(error.value) + capsys.readouterr().err


@pytest.mark.parametrize("script", [*(f"{name}_gsm8k.py" for name in METHODS), "eval_latent.py"])
def test_vllm_is_asked_for_by_name_and_must_be_there(tmp_path, monkeypatch, capsys, script):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("unsloth_ext.common.vllm_installed.installed_version", lambda _: None)
    argv = ["--checkpoint", "base"] if script == "eval_latent.py" else []
    with pytest.raises((ImportError, SystemExit)) as error:
        run_recipe(monkeypatch, script, *argv, "--engine", "vllm")
    assert "engine='vllm': vLLM is not installed" in str(error.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_vllm_evaluates_in_one_process_only(monkeypatch):
    monkeypatch.setattr("trl_ext.latent.recipe.require_vllm", lambda _: None)
    assert parsed(monkeypatch, "codi", "--engine", "vllm")[0].engine == "vllm"
    monkeypatch.setattr("transformers.TrainingArguments.world_size", 2)
    with pytest.raises(ValueError, match="--engine vllm: vLLM evaluates in one process"):
        parsed(monkeypatch, "codi", "--engine", "vllm")


def test_the_tiny_task_has_its_own_defaults_and_no_more_in_a_closer_look():
    arguments = runpy.run_path(str(RECIPES / "eval_latent.py"), run_name="recipe")["EvalArguments"]

    def found(**given):
        args = arguments("out/final", **given)
        return args.answer_prompt, args.step_separator, args.max_new_tokens

    assert found() == (equations.ANSWER_PROMPT, equations.STEP_SEPARATOR, equations.MAX_NEW_TOKENS)
    assert found(dataset="mine.jsonl") == (LatentArguments.answer_prompt, LatentArguments.step_separator, 256)
    for dataset in ("tiny", "mine.jsonl"):
        given = {"answer_prompt": "=>", "step_separator": "|", "max_new_tokens": 99}
        assert found(dataset=dataset, **given) == tuple(given.values())


def parsed(monkeypatch, method, *argv):
    from trl_ext.latent.recipe import parse

    names = runpy.run_path(str(RECIPES / f"{method}_gsm8k.py"), run_name="recipe")
    config = next(value for name, value in names.items() if name.endswith("Config"))
    extra = ["--bf16", "false", "--use_cpu", "true"]  # this machine may have no GPU
    return parse([*argv, *extra], method, config, RECIPES / "configs")


@pytest.mark.parametrize("kind", ["tiny", "gsm8k"])
@pytest.mark.parametrize("method", METHODS)
def test_every_shipped_config_loads_and_names_its_command(method, kind, monkeypatch):
    config = RECIPES / f"configs/{method}_{kind}.yaml"
    assert config.read_text().startswith(f"# python recipes/{method}_gsm8k.py")
    parsed(monkeypatch, method, "--config", str(config))


def test_flags_win_over_the_file_and_the_file_over_the_preset(monkeypatch, tmp_path):
    script, args = parsed(monkeypatch, "kava", "--model_name", "some/model")
    assert script.preset == "kava-qwen-0.5b-aug" and (script.lora_r, script.lora_alpha, script.lora_dropout) == (
        128,
        32,
        0.1,
    )
    assert (args.learning_rate, args.weight_decay, args.kv_loss, args.num_train_epochs) == (5e-4, 0.01, "mse", 10)
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 128
    script, args = parsed(
        monkeypatch, "kava", "--model_name", "some/model", "--preset", "kava-llama-3b-nl", "--w_kv", "3"
    )
    assert (args.learning_rate, args.kv_mix_lambda, args.w_codi, args.w_kv) == (2e-4, 0.0, 20.0, 3.0)
    (tmp_path / "x.yaml").write_text("preset: kava-llama-3b-nl\nlearning_rate: 1.0e-5\n")
    assert parsed(monkeypatch, "kava", "--config", str(tmp_path / "x.yaml"))[1].learning_rate == 1e-5
