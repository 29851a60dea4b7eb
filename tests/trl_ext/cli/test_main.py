"""The command line `latent-reasoning`: its commands, as a user runs them."""

import importlib
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import trl_ext
from tests.processes import ROOT, fresh
from trl_ext.cli import completion, defaults, main, methods, train
from trl_ext.common import run_folder
from trl_ext.common.method import commands
from trl_ext.minimind.data import load_minimind_data
from trl_ext.tasks import check
from trl_ext.tasks.data import load_rows


ROWS = {command.trains: command for command in commands().values() if command.trainer}


def ok(*words, **how):
    done = fresh("-m", "trl_ext", *words, **how)
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(*words, **how):
    done = fresh("-m", "trl_ext", *words, **how)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("name", main.COMMANDS)
def test_every_command_has_a_parser_and_says_what_it_does(name):
    module, about = main.COMMANDS[name]
    assert f"  {name:12}{about}" in main.usage()
    module = importlib.import_module(module)
    assert callable(module.main) and (name == "train" or module.parser().prog == f"latent-reasoning {name}")


def test_the_command_is_installed_and_light(tmp_path):
    """No torch for its help: it answers at once, outside of a checkout too."""
    # A wheel that was built here has left metadata without a program
    files = [file for one in metadata.distributions(name="latent-reasoning-trl") for file in one.files or ()]
    (program,) = (file.locate().resolve() for file in files if file.name == "latent-reasoning")
    done = subprocess.run([program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.strip() == main.usage()
    done = subprocess.run([program, "trian"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("latent-reasoning: trian: there is no such command")
    code = "import sys; from trl_ext.cli.main import main; main(); from trl_ext.cli import methods; methods.main([]); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("False\n"), done.stderr


@pytest.mark.parametrize(
    "words, said",
    [
        (["trian"], "trian: there is no such command; did you mean train?; --help lists them"),
        (["train", "kv-distil"], "there is no such method; did you mean kv-distill?"),
        (["train", "kavva"], "there is no such method; did you mean kava?"),
        (["train", "hrpo", "--lr_gate", "1"], "--lr_gate: there is no such flag"),
        (["train", "hrpo", "--config", "hrpo_gsm9k"], "there is no such file, and no configuration of that name comes"),
        (["train", "spo", "--config", "nothing"], "there is no such file, and no configuration of that name comes"),
        (["train", "hrpo", "--config", "nothing.yaml"], "--config nothing.yaml: there is no such file"),
        (["defaults", "hrp"], "method: invalid choice: 'hrp' (choose from 'coconut', 'codi'"),
        (["data", "check", "nothing.jsonl", "--method", "hrpo"], "dataset nothing.jsonl: there is no such file"),
        (["data", "check", "x.jsonl"], "the following arguments are required: --method"),
        (["methods", "--nothing"], "--nothing: there is no such flag"),
    ],
)
def test_wrong_input_is_told_in_one_sentence(words, said):
    assert said in refused(*words)


def test_methods_are_those_of_the_readme():
    """What they do and what was measured, word for word."""
    text = (ROOT / "README.md").read_text()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:3] == "| ["]
    told = {cell[3]: (cell[1], re.sub(r"\[(.*?)\]\(.*?\)", r"\1", cell[4])) for cell in cells}
    for command in ROWS.values():
        assert told[f"`make {command.name}`"] == (command.what, command.evidence)


@pytest.mark.parametrize("name", ROWS)
def test_a_row_tells_the_trainers_own_parent_and_paper(name):
    command = ROWS[name]
    cls = getattr(trl_ext, command.trainer)
    parent = next(base for base in cls.__mro__ if base.__module__.startswith("trl.trainer"))
    assert command.parent == parent.__name__
    paper = getattr(cls, "_paper", {})
    if paper != getattr(parent, "_paper", {}):
        assert command.paper == paper["id"]
    else:  # a formula that is older than these trainers, or ours
        assert not command.paper or f"arXiv {command.paper}" in getattr(trl_ext, defaults.configs()[name]).__doc__


def test_methods_prints_a_row_for_each(capsys):
    assert methods.main([]) == 0
    printed = capsys.readouterr().out
    assert all(f" {name} " in printed for name in ROWS) and "arXiv 2505.18454" in printed


@pytest.mark.parametrize("name", train.training_commands())
def test_every_method_has_one_recipe(name):
    (script,) = train.training_commands()[name].scripts
    assert (train.recipes() / Path(script).relative_to("recipes")).is_file()
    assert f"  {name} " in train.usage()


@pytest.mark.parametrize("name, config", [("hrpo", "hrpo_tiny"), ("spo", "spo_tiny"), ("kava", "kava_gsm8k")])
def test_a_shipped_configuration_is_found_by_its_name(name, config, tmp_path):
    """`--help` shows its values. The GPU's need a GPU."""
    flags = ["--config", config, "--use_cpu", "true", "--bf16", "false", "--check_flags"]
    said = ok("train", name, *flags, cwd=tmp_path)
    assert said.strip() == f"latent-reasoning train {name}: flags and configuration are valid"


def test_a_method_may_be_written_as_its_folder():
    assert "latent-reasoning train kv-distill: flags" in ok("train", "kv_distill", "--check_flags")


def test_help_shows_the_methods_own_fields_first(tmp_path):
    said = ok("train", "hrpo", "--help", cwd=tmp_path)
    assert said.startswith("usage: latent-reasoning train hrpo [--config FILE] [--field value ...]")
    assert said.index("\nHRPO:") < said.index("--thinking_source") < said.index("\nModel, data and evaluation:")
    assert said.index("\nModel, data and evaluation:") < said.index("\nTraining, the flags used most:")


def test_a_resumed_run_is_told_the_command_that_works(monkeypatch, tmp_path):
    words = ["latent-reasoning", "train", "hrpo", "--max_steps", "3", "--overwrite"]
    python = Path(sys.executable)
    monkeypatch.setattr(shutil, "which", lambda name: str(python.with_name(name)))
    assert run_folder.resume_command(words) == (
        "latent-reasoning train hrpo --max_steps 3 --resume_from_checkpoint latest"
    )
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert run_folder.resume_command(words).endswith(
        " -m trl_ext train hrpo --max_steps 3 --resume_from_checkpoint latest"
    )
    assert run_folder.resume_command(["recipes/a b.py"]).endswith(" 'recipes/a b.py' --resume_from_checkpoint latest")
    monkeypatch.setattr(sys, "argv", ["latent-reasoning train hrpo", "--hub_token", "x", "--seed", "1"])
    assert run_folder.command_words() == [*words[:3], "--hub_token", "***", "--seed", "1"]


@pytest.mark.parametrize("name", ROWS)
def test_a_source_names_a_field(name):
    """A renamed field would fall back to "ours" in silence."""
    config = getattr(trl_ext, defaults.configs()[name])
    known = {field for field, *_ in defaults.own_fields(config)}
    for cls in config.__mro__:
        for source, names in vars(cls).get("default_sources", {}).items():
            assert isinstance(names, tuple) and set(names) <= known, (cls, source)


def test_sources_of_a_subclass_win():
    found = {field: (value, source) for field, value, source, _ in defaults.own_fields(trl_ext.KAVAConfig)}
    assert found["w_codi"] == (10.0, "KaVa's paper") and found["w_student"] == (1.0, "official code")
    assert found["step_separator"] == (" ", "ours")
    found = {field: (value, source) for field, value, source, _ in defaults.own_fields(trl_ext.CODIConfig)}
    assert found["w_codi"] == (1.0, "official code") and found["num_latents"] == (6, "official code")
    found = {field: source for field, _, source, _ in defaults.own_fields(trl_ext.HRPOConfig)}
    assert found["residual_r_min"] == "paper" and found["recompute"] == "ours" and "learning_rate" not in found


def test_defaults_prints_every_field(capsys):
    assert defaults.main(["spo"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("SPOConfig: fields beyond GRPOConfig's")
    for field, *_ in defaults.own_fields(trl_ext.SPOConfig):
        assert re.search(rf"│ {field} +│", printed), field


@pytest.fixture
def file(tmp_path):
    rows = [
        json.dumps({"question": "1+1?", "answer": "<<1+1=2>> #### 2"}),
        json.dumps({"question": "", "answer": "#### 2"}),
        "not json",
        "[1]",
        json.dumps({"question": "x", "answer": "no"}),
        '{"question": "x", "answer": "\\ud800 #### 3"}',
        json.dumps({"question": "x", "answer": "#### 3"}),
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(rows) + "\n")
    return str(path)


@pytest.mark.parametrize(
    "method, unusable", [("hrpo", [2, 3, 4, 5, 6]), ("planner", [2, 3, 4, 5, 6]), ("kava", [2, 3, 4, 5, 6, 7])]
)
def test_unusable_rows_are_named_by_line(file, method, unusable, capsys):
    count, errors = check.unusable_rows(file, method)
    assert count == 7 and [int(re.search(r"line (\d+)", str(error))[1]) for error in errors] == unusable
    assert check.main(["check", file, "--method", method, "--show", "2"]) == 1
    first, *lines = capsys.readouterr().out.splitlines()
    usable = 7 - len(unusable)
    assert first == f"{file}: {usable} of 7 rows usable for {method} ({usable / 7:.1%})"
    assert [line.split(":")[0] for line in lines[:2]] == ["  line 2", "  line 3"]
    assert lines[2] == f"  and {len(unusable) - 2} more; --show {len(unusable)} shows all"


def test_rows_that_are_all_usable(file, tmp_path, capsys):
    good = tmp_path / "good.jsonl"
    good.write_text(json.dumps({"conversations": [{"content": "a"}, {"content": "b"}]}) + "\n")
    for method in ("spo", "ppo", "distill"):
        assert check.main(["check", str(good), "--method", method]) == 0
    assert "1 of 1 rows usable for distill (100.0%)" in capsys.readouterr().out
    assert check.main(["check", str(good), "--method", "reason"]) == 1
    assert "line 1, conversations[1].content: has <think> 0 times, not once" in capsys.readouterr().out


def test_bytes_numbers_and_depths_that_cannot_be_read_are_rows_too(tmp_path):
    good = json.dumps({"question": "1+1?", "answer": "#### 2"}).encode()
    lines = [good, b"\xff", b'{"question": ' + b"1" * 5000 + b"}", b"[" * 100_000, good]
    (tmp_path / "x.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    count, errors = check.unusable_rows(str(tmp_path / "x.jsonl"), "hrpo")
    assert count == 5 and [re.search(r"line (\d)", str(error))[1] for error in errors] == ["2", "3", "4"]


@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.data"])
def test_minimind_reads_lines_of_json_whatever_the_files_name(tmp_path, name):
    row = json.dumps({"conversations": [{"content": "a"}, {"content": "b"}]})
    (tmp_path / name).write_text(row + "\n")
    assert check.unusable_rows(str(tmp_path / name), "spo") == (1, [])
    assert len(load_minimind_data(tmp_path / name, "rl")) == 1


def test_a_reader_that_leaves_is_no_error():
    for words in ("-h", "methods"):
        command = f"{sys.executable} -m trl_ext {words} | true; echo ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
        assert (done.stdout.strip(), done.stderr) == ("0", "")


def test_methods_may_be_written_in_other_ways(capsys):
    assert defaults.main(["KV_Distill"]) == 0 and "KVDistillConfig" in capsys.readouterr().out


def test_a_file_of_broken_lines_only(tmp_path, capsys):
    (tmp_path / "x.jsonl").write_text("a\nb\n")
    assert check.main(["check", str(tmp_path / "x.jsonl"), "--method", "hrpo"]) == 1
    assert "0 of 2 rows usable" in capsys.readouterr().out


def test_a_checked_file_is_the_one_that_the_recipe_reads(file):
    """The first unusable row of the check is the one that the recipe stops at."""
    _, (first, *_) = check.unusable_rows(file, "hrpo")
    assert "line 2" in str(first)
    valid = Path(file).with_name("valid.jsonl")
    lines = Path(file).read_text().splitlines()
    valid.write_text("\n".join(line for number, line in enumerate(lines, start=1) if number not in (3, 4, 6)) + "\n")
    with pytest.raises(ValueError, match="line 2: the question is empty"):
        load_rows(str(valid), split="train", size=None, seed=0)


def completed(script, *words):
    """What bash offers after these words."""
    line, given = " ".join(words), " ".join(f"'{word}'" for word in words)
    ask = f"""source {script}
COMP_WORDS=({given}); COMP_CWORD={len(words) - 1}; COMP_LINE='{line}'; COMP_POINT={len(line)}
_shtab_latent_reasoning latent-reasoning '{words[-1]}' '{words[-2]}'; echo "${{COMPREPLY[@]}}"
"""
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True)
    return done.stdout.split()


def test_bash_completes_commands_methods_and_flags(tmp_path):
    script = tmp_path / "completion.sh"
    script.write_text(ok("completion", "bash"))
    assert completed(script, "latent-reasoning", "tr") == ["train"]
    assert {"kava", "kv-distill"} == {*completed(script, "latent-reasoning", "train", "k")}
    offered = completed(script, "latent-reasoning", "train", "hrpo", "--lr_")
    assert {"--lr_residual_gate", "--lr_scheduler_type"} <= {*offered}
    assert "--w_kv" in completed(script, "latent-reasoning", "train", "kava", "--w_")
    assert completed(script, "latent-reasoning", "plan", "--eng") == ["--engine"]
    assert "zsh" in completed(script, "latent-reasoning", "completion", "z")


def test_completion_needs_a_known_shell():
    with pytest.raises(ValueError, match="shell: invalid choice: 'csh2'"):
        completion.main(["csh2"])
