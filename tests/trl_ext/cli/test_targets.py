"""What the methods' make targets run."""

import subprocess
import sys

import pytest

from tests.test_house import ROOT
from trl_ext.cli.targets import command_lines
from trl_ext.common.method import Command, commands


TRAIN = Command("train-x", "", "recipes/x.py", "recipes/y.py", configs="x")
CONFIG = ["--config", "recipes/configs/x_gsm8k.yaml"]


@pytest.mark.parametrize(
    "gpu, model, chosen",
    [(False, "", []), (True, "", CONFIG), (False, "m", ["--model_name", "m"]), (True, "m", ["--model_name", "m"])],
)
def test_a_model_wins_over_the_configuration_of_a_gpu(gpu, model, chosen):
    first, second = command_lines(TRAIN, gpu, model, ["--flag", "a b"])
    assert first == [sys.executable, "recipes/x.py", *chosen, "--flag", "a b"]
    assert second == [sys.executable, "recipes/y.py"]


def test_what_takes_no_model_is_given_none():
    command = commands()["minimind-gpu"]
    assert command_lines(command, True, "m", ["--x"]) == [
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
