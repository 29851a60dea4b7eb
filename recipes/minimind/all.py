"""Run every stage of a small language model, one after the other, and the report.

    make minimind                                        # the embedded default
    make minimind ARGS="--overwrite --run_dir runs/mine --pretrain '--max_steps 600' --dpo '--beta 0.2'"
    python recipes/minimind/all.py --published           # MiniMind's sizes, with its files in dataset/

Each stage is a separate recipe; its flags are given in one string. `--run_dir` moves all folders of the embedded
default. If a folder holds stages already, only `--overwrite` deletes anything, and only files that the stages made.
"""

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

import yaml

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl_ext.cli.command_line import CommandLine
from trl_ext.common.run_folder import begun_by, check_free, checkpoints, holds_results, noted, resume_command
from trl_ext.common.spelling import underscored


RECIPES = Path(__file__).parent
STAGES = ("tokenizer", "pretrain", "sft", "lora", "dpo", "ppo", "grpo", "spo", "distill", "reason")
RUN_DIR = "runs/minimind"  # the folder in the configurations


def command(name: str, run_dir: str, published: bool, flags: list[str]) -> list[str]:
    """The command of a stage, with the folders of its configuration moved to `run_dir`."""
    config = RECIPES / "configs" / f"{name}{'' if published else '_tiny'}.yaml"
    made = [sys.executable, str(RECIPES / f"{name}.py"), "--config", str(config)]
    if not published and run_dir != RUN_DIR:
        for field, value in yaml.safe_load(config.read_text()).items():
            if str(value).startswith(RUN_DIR):
                made += [f"--{field}", run_dir + value.removeprefix(RUN_DIR)]
    return made + flags


def words(text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be split into flags: {error}") from error


def joined(argv: list[str]) -> list[str]:
    """The command line with `--dpo --packing` as `--dpo=--packing`, which argparse reads as a value."""
    found, rest = [], iter(argv)
    for word in rest:
        value = next(rest, None) if word.removeprefix("--") in STAGES and word.startswith("--") else None
        found.append(word if value is None else f"{word}={value}")
    return found


def main() -> int:
    parser = CommandLine(
        description=__doc__.split("\n\n")[0],
        epilog="Give a stage's own flags in one string: --sft '--max_steps 100'; --sft --help shows them.",
    )
    parser.add_argument(
        "--run_dir", default=RUN_DIR, metavar="FOLDER", help=f"Folder of all stages (default: {RUN_DIR})."
    )
    parser.add_switch("--published", "Use MiniMind's published sizes and files.")
    parser.add_switch("--overwrite", "Delete earlier runs in the stages' folders and start over.")
    parser.add_argument("--check_flags", action="store_true", help="Check the stages' flags, and exit.")
    parser.add_argument(
        "--stages",
        nargs="+",
        default=STAGES,
        choices=STAGES,
        metavar="STAGE",
        help=f"Run only these, in the usual order: {', '.join(STAGES)}.",
    )
    for name in STAGES:
        parser.add_argument(
            f"--{name}", type=words, default=[], metavar="FLAGS", help=f"Flags of {name}.py, in one string."
        )
    options, others = parser.parse_known_args(joined(sys.argv[1:]))
    try:
        parser.refuse(others)
    except ValueError as error:
        raise ValueError(f"{error}; give a stage's own flags in one string: --sft '--max_steps 100'") from None
    if options.published and options.run_dir != RUN_DIR:
        parser.error("--run_dir only moves the embedded default; the published configurations name their own folders")
    names = [name for name in STAGES if name in options.stages]
    run_dir = Path("runs/minimind_gpu" if options.published else options.run_dir)
    there = [str(run_dir / name) for name in names if holds_results(run_dir / name)]
    if there and not options.overwrite and not options.check_flags:
        others = " ".join(name for name in names if not holds_results(run_dir / name))
        folders = [run_dir / name for name in names if checkpoints(run_dir / name)]
        cut_short = [folder for folder in folders if begun_by(folder) and noted(folder, "finished") is None]
        parser.error(
            f"{', '.join(there)}: holds a run already; --overwrite deletes it, --run_dir names another folder, "
            + (f"--stages {others} runs the others" if others else "--stages runs some of the stages")
            + "".join(f"; {folder} has not finished: {resume_command(begun_by(folder))}" for folder in cut_short)
        )
    commands = {}
    for name in STAGES:
        given = underscored(getattr(options, name))
        if given and name not in names:
            parser.error(f"--{name}: this stage is not among --stages")
        if name in names and not options.check_flags:
            check_free(run_dir / name, options.overwrite)
        moved = [flag for flag in given if flag.partition("=")[0] in ("--run_dir", "--output_dir", "--overwrite")]
        if moved:
            parser.error(f"--{name}: {moved[0]} applies to all stages: give --run_dir or --overwrite outside --{name}")
        commands[name] = command(name, options.run_dir, options.published, given)
        if {"-h", "--help", "--help_all"} & {*given}:
            return subprocess.run(commands[name], check=False).returncode
        if given:
            right = subprocess.run([*commands[name], "--check_flags"], check=False, stdout=subprocess.DEVNULL)
            if right.returncode:
                return right.returncode
    if options.check_flags:
        print(f"{parser.prog}: flags are valid")
        return 0
    for name in names:
        overwrite = ["--overwrite", "true"] if options.overwrite else []
        done = subprocess.run([*commands[name], *overwrite], check=False)
        if done.returncode:
            return done.returncode
    return subprocess.run(command("report", options.run_dir, options.published, []), check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
