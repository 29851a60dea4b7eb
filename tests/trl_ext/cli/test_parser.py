"""Flags in full, in either spelling and by other programs' names; checked files; our flags first in the help."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from trl_ext import HRPOConfig, KAVAConfig, KVDistillConfig
from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.flags import chosen
from trl_ext.cli.parser import RecipeParser
from trl_ext.cli.recipe import RecipeArguments
from trl_ext.common.spelling import underscored
from trl_ext.latent.recipe import ScriptArguments as LatentScript
from trl_ext.tasks.data import DataArguments


CPU = ["--output_dir", "x", "--use_cpu", "true", "--bf16", "false", "--report_to", "none"]


@dataclass
class HRPOScript(RecipeArguments):
    max_seq_length: int = field(default=2048, metadata={"help": "Prompt and completion together."})


RECIPES = {
    "hrpo": (HRPOScript, DataArguments, HRPOConfig),
    "kava": (LatentScript, KAVAConfig),
    "kv": (RecipeArguments, DataArguments, KVDistillConfig),
}


def parse(recipe, *flags):
    return RecipeParser(RECIPES[recipe]).parse_args_and_config([*CPU, *map(str, flags)])


@pytest.fixture
def config(tmp_path):
    def write(content):
        file = tmp_path / "c.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        return ["--config", file]

    return write


def table(heading: str) -> list[list[str]]:
    page = Path(__file__, "../../../../docs/migrating.md").resolve().read_text()
    rows = page.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip().strip("`") for cell in row.strip("|").split(" | ")] for row in rows if row.startswith("| `")]
    assert len(cells) > 4 and all(len(row) == 3 for row in cells)
    return cells


@pytest.mark.parametrize("theirs, ours, recipe", table("Flags and fields that are accepted"))
def test_other_names_mean_what_the_page_says(theirs, ours, recipe, config):
    wanted = parse(recipe, *ours.split())
    assert parse(recipe, *theirs.split()) == wanted != parse(recipe, "--seed", 9)
    assert parse(recipe, *re.sub(r"(--\S+) ", r"\1=", theirs).split()) == wanted
    in_file = re.sub(r" ?--(\S+) (\S+)", r"\1: \2\n", theirs)
    assert parse(recipe, *config(in_file)) == wanted


@pytest.mark.parametrize("theirs, said, recipe", table("Flags that are refused with a hint"))
def test_other_names_are_answered_as_the_page_says(theirs, said, recipe, config):
    with pytest.raises(ValueError, match=re.escape(said)):
        parse(recipe, *theirs.split())
    with pytest.raises(ValueError, match=re.escape(said.replace("--", ""))):
        parse(recipe, *config(re.sub(r"--(\S+) (\S+)", r"\1: \2", theirs)))


def test_an_answer_names_flags_of_the_recipe_alone():
    with pytest.raises(ValueError, match=r"TRL no longer truncates prompts; max_length bounds the whole row$"):
        parse("kava", "--max_prompt_length", 9)
    with pytest.raises(ValueError, match=r"truncates prompts; max_seq_length bounds .*; max_completion_length bounds"):
        parse("hrpo", "--max_prompt_length", 9)


@pytest.mark.parametrize("theirs, ours, recipe", table("Blocks of a configuration file"))
def test_blocks_mean_what_the_page_says(theirs, ours, recipe, config):
    assert parse(recipe, *config(theirs)) == parse(recipe, *ours.split()) != parse(recipe)


def test_both_spellings_are_one_flag():
    for flags in (["--model-name", "X"], ["--model_name", "X"], ["--model-name=X"], ["--model_name=X"]):
        assert parse("hrpo", *flags)[0].model_name == "X"
    assert parse("hrpo", "--no-thinking")[2].thinking is False
    assert underscored(["--pre-train", "--max-steps 1e-4", "-a-b", "c-d"]) == [
        "--pre_train",
        "--max-steps 1e-4",
        "-a-b",
        "c-d",
    ]
    assert parse("hrpo", "--answer_delimiter=--a-b--")[2].answer_delimiter == "--a-b--"


@pytest.mark.parametrize(
    "given, wanted",
    [
        *(((flag, "X"), "X") for flag in ("--model_name", "--model-name", "--model_name_or_path", "--student")),
        *(((f"{flag}=X",), "X") for flag in ("--model_name", "--model-name", "--model-name-or-path", "--student")),
        (("--max-steps", "3", "--model-name", "small"), "small"),
        (("--model_n", "X"), "tiny"),  # no such flag, as the parser says next
        ((), "tiny"),
    ],
)
def test_the_model_chooses_its_configuration_in_every_spelling(given, wanted, config):
    folder = Path("configs")
    name, file, _ = chosen(list(given), folder, "hrpo", ("tiny", "small"))
    assert name == wanted and file == folder / f"hrpo_{'gsm8k' if wanted == 'X' else wanted}.yaml"
    for key in ("model_name", "model_name_or_path", "student"):
        flag, file = config(f"{key}: Y")
        name, own, others = chosen([flag, str(file), *given], folder, "hrpo", ("tiny", "small"))
        assert (own, others) == (file, underscored(given)) and name == ("Y" if wanted == "tiny" else wanted)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model_n", "X"], r"^--model_n: there is no such flag; did you mean --model_name\?$"),
        (["stray"], "^stray: neither a flag nor the value of a flag"),
        (["--num_generations", "0"], "^num_generations=0: must be at least 1$"),
        (["--num_generations", "-3"], "^num_generations=-3: must be at least 1$"),
        (["--per_device_train_batch_size", "0"], "^per_device_train_batch_size=0: must be at least 1$"),
        (["--gradient_accumulation_steps", "0"], "^gradient_accumulation_steps=0: must be at least 1$"),
        (["--temperature", "nan"], "^temperature=nan: must be more than 0$"),
        (["--learning_rate", "fast"], "^--learning_rate: invalid float value: 'fast'$"),
        (["--max_steps", "2.7"], "^--max_steps: invalid int value: '2.7'$"),
        (["--max_steps"], "^--max_steps: expected one argument$"),
        (["--config"], "^--config: expected one argument$"),
        (["--config", "none.yaml"], "^--config none.yaml: there is no such file$"),
        (["--lora_dropout", "1"], "^lora_dropout=1.0: must be from 0 to less than 1$"),
        (["--eval_size", "0"], "^eval_size=0: must be at least 1$"),
        (["--train_size", "3"], "^train_size=3: the tiny task makes its own rows"),
        (["--eval_dataset", "mine.jsonl"], "^eval_dataset=mine.jsonl: dataset=tiny has its own held-out rows"),
        (["--optim", "adamw_troch"], "^--optim: invalid choice: 'adamw_troch'; did you mean .*adamw_torch"),
        (["--temperature", "0"], "^temperature=0.0: must be more than 0$"),
        (["--top_p", "2"], "^top_p=2.0: from 0 to 1$"),
        (["--adam_beta2", "1"], "^adam_beta2=1.0: from 0 to less than 1$"),
        (["--epsilon", "-1"], "^epsilon=-1.0: must be at least 0$"),
        (["--max_steps", "0"], "^max_steps=0: must be at least 1, or -1"),
        (["--reward_weights", "nan"], r"^reward_weights=\[nan\]: finite numbers$"),
        (["--optim_args", "foo"], "^optim_args='foo': name=value"),
        (["--optim", "foo"], "^--optim: invalid choice: 'foo'; --help_all lists the choices$"),
        (["--seed", str(10**20)], "^seed=10+: at most 4294967295$"),
        (["--generation_kwargs", "[1]"], r"^generation_kwargs='\[1\]': a JSON object"),
        (["--model_init_kwargs", "{x"], "^model_init_kwargs='{x': a JSON object"),
    ],
)
def test_wrong_flags(flags, message):
    with pytest.raises(ValueError, match=message):
        parse("hrpo", *flags)


@pytest.mark.parametrize(
    "content, message",
    [
        ("max_steps: null", "c.yaml: max_steps: null is not a whole number$"),
        ("learning_rate: null", "learning_rate: null is not a number$"),
        ("max_steps: 2.7", "max_steps: 2.7 is not a whole number$"),
        ("max_steps: [1]", r"max_steps: \[1\] is not a whole number$"),
        ("max_steps: 2026-01-01", "max_steps: .* is not a whole number$"),
        ("max_steps: many", "max_steps: 'many' is not a whole number$"),
        ("adam_beta1: true", "adam_beta1: true is not a number$"),
        ("model_name: 7", r"model_name: 7 is not text \(in quotes\)$"),
        ("model_name: {a: 1}", "model_name: {'a': 1} is not text"),
        ("bf16: maybe", "bf16: 'maybe' is not true or false or null$"),
        ("bf16: 2", "bf16: 2 is not true or false or null$"),
        ("eval_strategy: sometimes", "eval_strategy: 'sometimes': choose one of no, steps, epoch$"),
        ("lora_target_modules: [on]", "lora_target_modules: true is not text"),
        ("learning_raet: 1", r"learning_raet: there is no such field; did you mean learning_rate\?$"),
        ("max_steps: 1\nseed: 1\nmax_steps: 2", "c.yaml: line 3: max_steps is given twice$"),
        ("- 1", "does not consist of `field: value` lines$"),
        ("", "does not consist of `field: value` lines$"),
        ("a: [", "while parsing"),
        ("env: 3", "env: 3 is not a mapping"),
        ("run_name: é".encode("latin-1"), "c.yaml, line 1: not UTF-8; save the file as UTF-8$"),
        ("max_steps: 3".encode("utf-16-le"), "not UTF-8"),
        ("num_generations: 0", "^num_generations=0: must be at least 1$"),
        ("lora: {rank: 8}", "lora.rank: there is no such key; lora has r, alpha, dropout, target_modules$"),
        ("lora: {dropuot: 8}", r"did you mean dropout\?$"),
        ("lora: {r: 8}\nlora_r: 9", "both set lora_r; give only one of them$"),
        ("lora: {r: eight}", "lora_r: 'eight' is not a whole number$"),
        ("lora: 8", "lora: there is no such field"),
        ("loss_config: {alpha_k: 1}", "loss_config.alpha_k: this recipe has no alpha_k"),
        ("lr: 1\nlearning_rate: 2", "learning_rate and lr both set learning_rate"),
    ],
)
def test_wrong_files(content, message, config):
    with pytest.raises(ValueError, match=message):
        parse("hrpo", *config(content))


def test_what_files_may_say(config):
    for content in (
        "max_steps: 3",
        "max_steps: 3.0",
        "max_steps: '3'",
        "\ufeffmax_steps: 3",
        "max_steps: 3".encode("utf-16"),
    ):
        assert parse("hrpo", *config(content))[2].max_steps == 3
    for content, value in (("do_eval: 0", False), ("do_eval: 1", True)):
        assert parse("hrpo", *config(content))[2].do_eval is value
    assert parse("hrpo", *config("learning_rate: 1e-4"))[2].learning_rate == 1e-4
    assert parse("hrpo", *config("lora_target_modules: q_proj"))[0].lora_target_modules == ["q_proj"]
    assert parse("hrpo", *config("train_size: null"), "--train_size", 3, "--dataset", "mine.jsonl")[0].train_size == 3
    assert parse("hrpo", *config("resume_from_checkpoint: false"))[2].resume_from_checkpoint is None
    script = parse("kava", *config("lora: {r: 8, target_modules: [q_proj]}"))[0]
    assert script.lora().target_modules == {"q_proj"} and script.lora().r == 8


def test_another_dataset_leaves_the_files_behind(config, capsys):
    file = config("dataset: h/a\ndataset_config: main\neval_dataset: h/b\neval_dataset_config: main")
    script = parse("kava", *file, "--dataset", "mine.jsonl")[0]
    assert (script.dataset_config, script.eval_dataset, script.eval_dataset_config) == (None, None, None)
    assert "eval_dataset=h/b" in capsys.readouterr().out
    assert parse("kava", *file, "--dataset", "h/a")[0].eval_dataset == "h/b"
    assert parse("kava", *file, "--eval_dataset", "none")[0].eval_dataset is None
    assert not capsys.readouterr().out
    script = parse("kava", *file, "--dataset", "mine.jsonl", "--eval_dataset", "held_out.jsonl")[0]
    assert script.eval_dataset == "held_out.jsonl"


def test_help_shows_ours_first_and_the_rest_on_request(config, capsys):
    def shown(*flags):
        with pytest.raises(SystemExit) as stopped:
            parse("hrpo", *flags)
        assert stopped.value.code == 0
        return capsys.readouterr().out

    ours, everything = shown(*config("lora_r: 17"), "--help"), shown("--help-all")
    assert len(ours.splitlines()) < 200 < len(everything.splitlines())
    order = ("--lr_thinking_projection ", "--eval_size ", "--dataset ", "--output_dir ", "--max_steps ", "--traceback ")
    places = [ours.index(f"\n  {flag}") for flag in order]
    assert places == sorted(places)
    for flag in (
        "generation_kwargs JSON",
        "accelerator_config JSON",
        "num_generations N",
        "top_k N",
        "temperature NUMBER",
    ):
        assert f"--{flag} " in everything, flag
    assert "--output_dir TEXT " in ours and re.search(r"--bf16 \[?true\|false", everything)
    assert "(default: 17)" in ours  # the value that it has here
    assert "--weight_decay " not in ours and "--weight_decay " in everything and "--weight-decay" not in everything


def test_plain_commands_are_as_strict():
    line = CommandLine()
    line.add_argument("--only-these", type=int)
    line.add_argument("--fresh", action="store_true")
    assert line.parse_args(["--only_these", "3"]) == line.parse_args(["--only-these=3"])
    for flags, message in (
        (["--only", "3"], r"--only: there is no such flag; did you mean --only_these\?"),
        (["--only_these", "x"], "invalid int value: 'x'"),
        (["x"], "x: neither a flag nor"),
    ):
        with pytest.raises(ValueError, match=message):
            line.parse_args(flags)


def test_nothing_but_flags_and_the_named_file_is_read(tmp_path, monkeypatch):
    """transformers' parser would read `recipe.args`, too, beside `recipe.py`."""
    (tmp_path / "recipe.args").write_text("--max_steps 7")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "recipe.py")])
    assert parse("hrpo")[2].max_steps != 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU computes in bf16")
@pytest.mark.parametrize("own, way_out", [(False, ""), (True, ", or --model_name tiny, which is made for it")])
def test_a_way_out_is_not_what_was_given(own, way_out, config, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    argv = ["--output_dir", "x", "--report_to", "none", *map(str, config("seed: 1"))]
    argv += ["--model_name", str(tmp_path) if own else "tiny"]
    with pytest.raises(ValueError, match=f"--use_cpu true --bf16 false{way_out}$"):
        RecipeParser(RECIPES["hrpo"], embedded=("tiny",)).parse_args_and_config(argv)
