"""The planner's recipe as a person runs it: small, whole, and with what one can get wrong."""

import json
import runpy
import shlex
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM
from trl import TrlParser

from tests import tiny
from tests.marks import slow
from tests.recipes.running import holds_no_pickle, run_recipe
from trl_ext import PlannerExecutorConfig
from trl_ext.tasks import facts
from trl_ext.tasks.data import DataArguments
from unsloth_ext import PlannerConfig, PlannerExecutorModel, attach_planner


RECIPE = Path(__file__).parents[2] / "recipes" / "planner_executor.py"
SMALL = shlex.split(
    "--max_steps 2 --eval_size 12 --eval_every 1 --disable_tqdm true "
    "--monitor_every 1 --per_device_train_batch_size 8 --save_steps 1 --logging_steps 1"
)


@pytest.fixture
def run(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)

    def start(*argv):
        run_recipe(monkeypatch, "planner_executor.py", *SMALL, "--output_dir", "out", *argv)

    return start


def summary():
    return json.loads(Path("out/summary.json").read_text())


@pytest.mark.parametrize("training", [slow("soft"), "hard_em"])
def test_whole_run_resume_and_what_it_leaves(run, capsys, training):
    run("--training", training)
    first = summary()
    assert first["steps"] == 2 and first["n_eval"] == 12 and set(first["accuracy_curve"]) == {"0", "1", "2"}
    assert first["after"]["nll"] > 0 and len(first["samples"]) == 12
    shown = capsys.readouterr().out
    assert "from a random plan" in shown and "written from it" in shown and "bits of a plan" in shown
    assert Path("out/curves.png").stat().st_size > 10_000 and Path("out/monitors.png").stat().st_size > 10_000
    assert holds_no_pickle("out/final")
    loaded = PlannerExecutorModel.from_pretrained("out/final")
    text, plan, written, _ = first["samples"][0]
    codes = [[code for code in row if code >= 0] for row in loaded.plan(text)[0].tolist()]
    assert codes == plan
    assert loaded.generate(text, max_new_tokens=6, do_sample=False) == written
    state = Path("out/checkpoint-2/trainer_state.json")
    for name, former in (("explained_bits", "told"), ("last_warned", "told")):  # as in checkpoints of earlier versions
        assert f'"{name}"' in state.read_text()
        state.write_text(state.read_text().replace(f'"{name}"', f'"{former}"'))
    run("--training", training, "--max_steps", "3", "--resume_from_checkpoint", "latest")
    assert summary()["steps"] == 3 and summary()["accuracy_before"] == first["accuracy_before"]
    assert summary()["before"]["explained_bits"] == first["before"]["explained_bits"]
    assert summary()["accuracy_curve"].items() >= first["accuracy_curve"].items()


@pytest.mark.parametrize("config", sorted(RECIPE.parent.glob("configs/planner_*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_config_loads_and_names_its_command(config):
    assert config.read_text().startswith("# python recipes/planner_executor.py")
    script_class = runpy.run_path(str(RECIPE), run_name="recipe")["ScriptArguments"]
    # This machine may have no GPU
    flags = ["--config", str(config), "--bf16", "false", "--use_cpu", "true"]
    script, _, args = TrlParser((script_class, DataArguments, PlannerExecutorConfig)).parse_args_and_config(flags)
    assert len(args.planner().types) == 2 and script.model_name in ("tiny", "Qwen/Qwen3-0.6B")


def test_a_model_and_data_of_ones_own(run, tmp_path):
    """LoRA, prompts that the planner reads, completions that the executor writes, answers behind a delimiter."""
    tiny.model().save_pretrained(tmp_path / "model")
    tiny.tokenizer(()).save_pretrained(tmp_path / "model")
    rows = [{"question": f"{a} and {a}?", "answer": f"{a}+{a}={2 * a}\n#### {2 * a}"} for a in range(30)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    own = {
        "model_name": tmp_path / "model",
        "dataset": tmp_path / "rows.jsonl",
        "max_new_tokens": 6,
        "lora_r": 4,
        "use_cpu": "true",
        "bf16": "false",
        "report_to": "none",
        "auto": "true",
    }
    (tmp_path / "own.yaml").write_text("\n".join(f"{k}: {v}" for k, v in own.items()))
    run("--config", tmp_path / "own.yaml")
    assert summary()["n_eval"] == 12
    assert (
        json.loads(Path("out/final/latent_reasoning.json").read_text())["settings"]["types"][0]["num_concepts"] == 256
    )


@pytest.mark.parametrize("lora", [0, slow(4)])
@pytest.mark.slow
def test_hard_em_goes_on_from_a_model_that_plans(run, lora):
    """It begins with what the soft run ended with, adapter or not."""
    tiny = ("--config", RECIPE.parent / "configs/planner_tiny.yaml")
    if lora:  # needs a base in a folder
        model = facts.config(facts.tokenizer(), facts.Size(layers=2, width=32))
        AutoModelForCausalLM.from_config(model).save_pretrained("base")
        types = [{"name": "first", "num_concepts": 32, "quota": 2}, {"name": "second", "num_concepts": 32, "quota": 2}]
        attach_planner(AutoModelForCausalLM.from_pretrained("base"), PlannerConfig(types)).save_pretrained("planning")
        facts.tokenizer().save_pretrained("planning")
        run(*tiny, "--model_name", "planning", "--lora_r", lora)
    else:
        run()
    first = summary()
    run(*tiny, "--model_name", "out/final", "--training", "hard_em", "--output_dir", "more", "--lora_r", lora)
    more = json.loads(Path("more/summary.json").read_text())
    assert more["before"]["nll"] == pytest.approx(first["after"]["nll"], rel=1e-5)
    assert more["before"]["lengths"] == first["after"]["lengths"] and more["after"]["nll"] != more["before"]["nll"]
    PlannerExecutorModel.from_pretrained("more/final")


def test_a_planner_of_other_texts_is_not_for_the_tiny_task(run):
    attach_planner(tiny.model()).save_pretrained("planning")
    tiny.tokenizer(()).save_pretrained("planning")
    with pytest.raises(ValueError, match="the model has another tokenizer"):
        run("--config", RECIPE.parent / "configs/planner_tiny.yaml", "--model_name", "planning")


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--training", "hard"), "training='hard'"),
        (("--types", "[{"), "is not JSON"),
        (("--model_name", "tiny", "--dataset", "rows.jsonl"), "can only be used together"),
        (("--resume_from_checkpoint", "latest"), "no complete checkpoint"),
        (("--facts", "0"), "facts=0"),
        (("--use_planner", "false"), "use_planner=False: this recipe measures plans"),
    ],
)
def test_wrong_flags_end_before_training(run, flags, message):
    with pytest.raises((SystemExit, ValueError), match=message):
        run(*flags)
    assert not list(Path().glob("out/checkpoint-*"))
