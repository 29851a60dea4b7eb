"""Recipes that run others: each part gets its own flags, and what is wrong is said before the first one begins."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest


RECIPES = Path(__file__).parents[2] / "recipes"


@pytest.fixture
def chain(monkeypatch, tmp_path):
    """(exit status, commands) of a recipe whose parts are only written down; `rc` is what each of them ends with."""
    monkeypatch.chdir(tmp_path)

    def run(script, *argv, rc=lambda command: 0):
        commands = []

        def part(command, **_):
            commands.append([Path(command[1]).stem, *command[2:]])
            return subprocess.CompletedProcess(command, rc(commands[-1]))

        monkeypatch.setattr(subprocess, "run", part)
        monkeypatch.setattr(sys, "argv", [script, *argv])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(RECIPES / script), run_name="__main__")
        return stopped.value.code, commands

    return run


def holds_a_run(folder, known=True):
    (folder / "final").mkdir(parents=True)
    if known:
        (folder / "run.json").write_text(
            json.dumps({"id": "1", "commands": [{"command": f"x.py --output_dir {folder}"}]})
        )


def test_each_stage_gets_its_own_flags(chain, tmp_path):
    holds_a_run(tmp_path / "mine" / "sft")
    argv = [
        "--run_dir",
        "mine",
        "--overwrite",
        "--stages",
        "dpo",
        "sft",
        "--dpo",
        "--beta 0.2 --loss-type='ipo'",
        "--sft",
        "--packing",
    ]
    status, commands = chain("minimind/all.py", *argv)
    assert status == 0
    assert [command[0] for command in commands] == ["sft", "dpo", "sft", "dpo", "report"]  # checked, then run
    own = [["--packing"], ["--beta", "0.2", "--loss_type=ipo"]]
    for (checked, run), flags in zip(zip(commands[:2], commands[2:4]), own):
        assert checked[-len(flags) - 1 :] == [*flags, "--check_flags"]
        assert run == [*checked[:-1], "--overwrite", "true"]
        assert f"mine/{run[0]}" in run
    assert (tmp_path / "mine" / "sft" / "final").exists()  # deleting is the stage's own business


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--dpo", "--beta '2"], "--dpo: .*cannot be split into flags"),
        (["--max-steps", "5"], "--max_steps: there is no such flag; give a stage's own flags in one string: --sft"),
        (["--dpo", "--output-dir elsewhere"], "--dpo: --output_dir applies to all stages"),
        (["--stages", "sft", "--dpo", "--beta 1"], "--dpo: this stage is not among --stages"),
        (["--overwrite", "maybe"], "--overwrite: 'maybe' is neither true nor false"),
        (["--run_dir", "known"], "known/sft: holds a run already; --overwrite deletes"),
        (["--run_dir", "unknown", "--overwrite"], "unknown/lora has no run.json"),
    ],
)
def test_wrong_flags_of_the_stages_run_nothing(chain, tmp_path, argv, message):
    holds_a_run(tmp_path / "known" / "sft")
    holds_a_run(tmp_path / "unknown" / "lora", known=False)
    with pytest.raises(ValueError, match=message):
        chain("minimind/all.py", *argv)


def test_begun_again_after_a_stage_was_cut_short_the_ways_to_go_on_are_named(chain, tmp_path):
    holds_a_run(tmp_path / "mine" / "sft")
    (tmp_path / "mine" / "dpo" / "checkpoint-2").mkdir(parents=True)
    command = {"command": "dpo.py --overwrite true --output_dir mine/dpo"}
    (tmp_path / "mine" / "dpo" / "run.json").write_text(json.dumps({"id": "2", "commands": [command]}))
    argv = ["--run_dir", "mine", "--stages", "sft", "dpo", "ppo", "grpo"]
    resume = r"\S*python dpo.py --output_dir mine/dpo --resume_from_checkpoint latest"
    with pytest.raises(ValueError, match=rf"--stages ppo grpo runs the others; mine/dpo has not .*: {resume}$"):
        chain("minimind/all.py", *argv)
    (tmp_path / "mine" / "dpo" / "run.json").write_text(json.dumps({"id": "2", "commands": [command], "finished": 4}))
    with pytest.raises(ValueError, match=r"--stages ppo grpo runs the others$"):
        chain("minimind/all.py", *argv)
    with pytest.raises(ValueError, match=r"mine/stage_1 --resume_from_checkpoint latest$"):
        holds_a_run(tmp_path / "mine" / "stage_1")
        chain("hrpo_two_stage.py", "--output_dir", "mine", "--resume_from_checkpoint", "latest")


def test_a_stage_that_refuses_its_flags_or_fails_ends_the_chain(chain):
    checks = chain("minimind/all.py", "--spo", "--rho_min 2", rc=lambda command: 2 * ("--check_flags" in command))
    assert checks[0] == 2 and [command[0] for command in checks[1]] == ["spo"]
    status, commands = chain("minimind/all.py", rc=lambda command: 3 * (command[0] == "sft"))
    assert status == 3 and [command[0] for command in commands] == ["tokenizer", "pretrain", "sft"]


def test_flags_are_checked_alone_and_a_stage_shows_its_own(chain, tmp_path):
    holds_a_run(tmp_path / "known" / "sft")
    for argv, last in ((["--check_flags", "--sft", "--packing"], "--check_flags"), (["--sft", "--help"], "--help")):
        status, commands = chain("minimind/all.py", *argv)
        assert status == 0 and [(command[0], command[-1]) for command in commands] == [("sft", last)]
    assert chain("minimind/all.py", "--check_flags", "--run_dir", "known") == (0, [])
    for rc in (0, 2):
        status, commands = chain("hrpo_two_stage.py", "--check_flags", "--seed", "3", rc=lambda command, rc=rc: rc)
        assert status == rc and commands == [["hrpo_gsm8k", "--seed", "3", "--check_flags"]]


def test_the_two_stages(chain, tmp_path):
    holds_a_run(tmp_path / "mine" / "stage_1")
    argv = ["--output_dir", "mine", "--overwrite", "--seed", "3"]
    status, commands = chain("hrpo_two_stage.py", *argv)
    assert status == 0 and [command[0] for command in commands] == ["hrpo_gsm8k"] * 2
    for command, rate, folder in zip(commands, ("0.0", "5e-05"), ("stage_1", "stage_2")):
        flags = dict(zip(command[1::2], command[2::2]))
        assert flags["--lr_thinking_projection"] == rate and flags["--output_dir"] == f"mine/{folder}"
        assert flags["--overwrite"] == "True" and flags["--seed"] == "3" and flags["--max_steps"] == "45"
    assert commands[1][-2:] == ["--init_from", "mine/stage_1/final"] and "--init_from" not in commands[0]
    assert (tmp_path / "mine" / "stage_1" / "final").exists()


def test_what_a_configuration_file_says_of_both_stages_counts(chain, tmp_path):
    """Of steps and epochs, and of the projection's rate in the second; a flag counts more."""
    (tmp_path / "c.yaml").write_text("model_name: tiny\nmax_steps: 7\nlr_thinking_projection: 2.0e-4\n")
    (tmp_path / "d.yaml").write_text("model_name: tiny\n")
    for argv, rate, length in (
        (["--config", "c.yaml"], "0.0002", None),
        (["--config=c.yaml", "--max_steps", "8", "--lr_thinking_projection", "3e-4"], "0.0003", "8"),
        (["--config", "d.yaml"], "5e-05", "45"),
    ):
        status, commands = chain("hrpo_two_stage.py", "--output_dir", "mine", *argv)
        flags = [dict(zip(command[1::2], command[2::2])) for command in commands]
        assert status == 0 and [each["--lr_thinking_projection"] for each in flags] == ["0.0", rate]
        assert {each.get("--max_steps") for each in flags} == {length}
        assert {each["--config"] for each in flags} == {"d.yaml" if "d.yaml" in argv else "c.yaml"}
    (tmp_path / "c.yaml").write_text("max_steps: [")
    with pytest.raises(ValueError, match=r"^--config c.yaml: while parsing"):
        chain("hrpo_two_stage.py", "--output_dir", "mine", "--config", "c.yaml")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--lr_thinking_projection", "fast"], "--lr_thinking_projection: invalid float"),
        (["--lr_thinking_projection", "-1"], "lr_thinking_projection=-1.0: must be at least 0"),
        (["--lr_thinking_projection", "inf"], "lr_thinking_projection=inf: must be a finite number"),
        (["--overwrite", "maybe"], "neither true nor false"),
        ([], "mine/stage_2 holds run 1"),
        (["--resume_from_checkpoint", "latest"], "python x.py --output_dir .*stage_2 --resume_from_checkpoint latest"),
    ],
)
def test_what_is_wrong_with_two_stages_is_said_before_the_first(chain, tmp_path, argv, message):
    holds_a_run(tmp_path / "mine" / "stage_2")
    with pytest.raises(ValueError, match=message):
        chain("hrpo_two_stage.py", "--output_dir", "mine", *argv)
