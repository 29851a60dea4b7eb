"""What the methods' make targets run."""

import subprocess
import sys

import pytest
from packaging.version import Version

from patches import versions
from tests.test_house import ROOT
from trl_ext.cli import targets
from trl_ext.cli.flags import wants_vllm
from trl_ext.cli.targets import command_lines
from trl_ext.common.method import Command, commands


TRAIN = Command("train-x", "", "recipes/x.py", configs="x")
CONFIG = ["--config", "x_gsm8k"]


@pytest.mark.parametrize(
    "gpu, model, chosen",
    [(False, "", []), (True, "", CONFIG), (False, "m", ["--model_name", "m"]), (True, "m", ["--model_name", "m"])],
)
def test_a_model_wins_over_the_configuration_of_a_gpu(gpu, model, chosen):
    (line,) = command_lines(TRAIN, gpu, model, ["--flag", "a b"])
    assert line == [sys.executable, "-m", "trl_ext", "train", "x", *chosen, "--flag", "a b"]


def test_a_target_that_does_not_train_runs_its_scripts():
    both = Command("bench-x", "", "benchmarks/x.py", "benchmarks/y.py", arguments=("--a",))
    first, second = command_lines(both, True, "m", ["--flag", "a b"])
    assert first == [sys.executable, "benchmarks/x.py", "--a", "--flag", "a b"]
    assert second == [sys.executable, "benchmarks/y.py"]


@pytest.mark.parametrize("gpu, chosen", [(False, []), (True, CONFIG)])
def test_a_task_is_the_dataset_and_an_embedded_one_needs_no_gpu(gpu, chosen):
    (line,) = command_lines(TRAIN, gpu, "", ["--x"], "reachability")
    assert line[4:] == ["x", "--dataset", "reachability", "--x"]
    (line,) = command_lines(TRAIN, gpu, "", ["--x"], "openai/gsm8k")
    assert line[4:] == ["x", *chosen, "--dataset", "openai/gsm8k", "--x"]
    (line,) = command_lines(TRAIN, gpu, "m", ["--x"], "rows.jsonl")
    assert line[4:] == ["x", "--model_name", "m", "--dataset", "rows.jsonl", "--x"]


def test_what_takes_no_model_is_given_none():
    command = commands()["minimind-gpu"]
    assert command_lines(command, True, "m", ["--x"], "reachability") == [
        [sys.executable, "recipes/minimind/all.py", "--published", "--x"]
    ]


def test_every_target_runs_files_that_are_there():
    for command in commands().values():
        assert all((ROOT / script).is_file() for script in command.scripts), command.name
        if command.configs:
            assert (ROOT / "recipes" / "configs" / f"{command.configs}_gsm8k.yaml").is_file(), command.name


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "trl_ext.cli.targets", *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_the_list_has_every_target():
    listed = run().stdout
    assert all(f"make {name} " in listed for name in commands())


def test_flags_reach_the_script_and_its_status_comes_back():
    done = run("train-codi", "--", "--nonsense", "1")
    assert done.returncode == 2 and "--nonsense: there is no such flag" in done.stderr
    done = run("train-nothing")
    assert done.returncode == 2 and "no target train-nothing" in done.stderr


@pytest.mark.parametrize(
    "gpu, model, arguments, problem, added, said",
    [
        (True, "", [], None, ["--use_vllm"], "rollouts: vLLM"),
        (True, "m", [], None, ["--use_vllm"], "rollouts: vLLM"),
        (True, "", [], "vLLM is not installed", [], "rollouts: transformers, because vLLM is not installed"),
        (True, "", ["--use_vllm", "false"], None, [], ""),
        (True, "", ["--use-vllm=false"], None, [], ""),
        (True, "smollm2", [], None, [], ""),
        (False, "", [], None, [], ""),
    ],
)
def test_rollouts_in_vllm_where_there_are_a_gpu_and_vllm(
    monkeypatch, capsys, gpu, model, arguments, problem, added, said
):
    monkeypatch.setattr(targets, "vllm_problem", lambda: problem)
    ((_, _, *found),) = command_lines(commands()["train-hrpo"], gpu, model, arguments)
    assert "--use_vllm" not in command_lines(commands()["train-hrpo"], gpu, model, [], "reachability")[0]
    assert found[len(found) - len(added) - len(arguments) :] == [*added, *arguments]
    assert ("--use_vllm" in found) == bool(added) or arguments
    assert capsys.readouterr().out.startswith(said) if said else not capsys.readouterr().out


def test_why_there_is_no_vllm(monkeypatch):
    monkeypatch.setattr(versions, "installed_version", lambda name: None)
    assert targets.vllm_problem() == "vLLM is not installed"
    monkeypatch.setattr(versions, "installed_version", lambda name: Version("0.20.0"))
    assert "vllm 0.20.0 is not among the tested versions" in targets.vllm_problem()
    monkeypatch.setattr(versions, "installed_version", lambda name: Version("0.31.0"))
    assert targets.vllm_problem() is None


@pytest.mark.parametrize(
    "flags, field, wanted",
    [
        ([], None, False),
        (["--use_vllm"], None, True),
        (["--use_vllm", "false"], True, False),
        (["--use-vllm=True"], None, True),
        ([], True, True),
        (["--output_dir", "x"], False, False),
    ],
)
def test_a_recipe_knows_early_whether_it_uses_vllm(tmp_path, flags, field, wanted):
    """Before Unsloth is imported, which must come first and cannot be undone."""
    config = tmp_path / "config.yaml"
    config.write_text("output_dir: x\n" if field is None else f"use_vllm: {str(field).lower()}\n")
    assert wants_vllm(config, flags) is wanted
