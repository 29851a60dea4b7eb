"""Run a make target of a method, as its record declares it.

    python -m trl_ext.cli.targets                                              # list them
    python -m trl_ext.cli.targets train-hrpo --gpu --model NAME --task NAME -- --flag value

Without a GPU and a model name, the recipe runs its embedded default, or another embedded task by its name. With a GPU and
neither, it runs its GSM8K configuration. With a GPU and vLLM, HRPO's rollouts are made in vLLM.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

from patches import versions

from ..common.method import Command, commands
from .flags import TASKS


ROOT = Path(__file__).parents[2]
EMBEDDED = ("tiny", "smollm2")


def command_lines(command: Command, gpu: bool, model: str, arguments: list[str], task: str = "") -> list[list[str]]:
    """The command lines of a target, to be run from the project's root.

    Args:
        command: the target.
        gpu: whether there is a GPU.
        model: value for `--model_name`; empty: not given.
        arguments: the user's arguments, for the first script.
        task: value for `--dataset`; empty: not given.
    """
    chosen: list[str] = []
    if command.configs and model:
        chosen = ["--model_name", model]
    elif command.configs and gpu and task not in TASKS:
        chosen = ["--config", f"{command.configs}_gsm8k"]
    if command.configs and task:
        chosen += ["--dataset", task]
    asked = any(word.partition("=")[0] in ("--use_vllm", "--use-vllm") for word in arguments)
    if command.vllm and gpu and model not in EMBEDDED and task not in TASKS and not asked:
        problem = vllm_problem()
        print(
            f"rollouts: transformers, because {problem}"
            if problem
            else "rollouts: vLLM (--use_vllm false: transformers)"
        )
        chosen += [] if problem else ["--use_vllm"]
    given = [*chosen, *arguments]
    if command.trains:
        return [[sys.executable, "-m", "trl_ext", "train", command.trains, *given]]
    lines = [[sys.executable, script] for script in command.scripts]
    lines[0] += [*command.arguments, *given]
    return lines


def vllm_problem() -> str | None:
    """Why the rollouts cannot be made in vLLM, or None."""
    found = versions.installed_version("vllm")
    return "vLLM is not installed" if found is None else versions.version_problem("vllm")


def main() -> int:
    """List the targets, or run one. Return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("target", nargs="?", help="name of the target; without one, list all")
    parser.add_argument("--gpu", action="store_true", help="there is a GPU")
    parser.add_argument("--model", default="", help="value for --model_name")
    parser.add_argument("--task", default="", help="value for --dataset")
    given = sys.argv[1:]
    at = given.index("--") if "--" in given else len(given)
    options = parser.parse_args(given[:at])
    known = commands()
    if options.target is None:
        for command in known.values():
            print(f"  make {command.name:24} {command.about}")
        return 0
    if options.target not in known:
        print(f"there is no target {options.target}; `make help` lists them", file=sys.stderr)
        return 2
    *before, last = command_lines(known[options.target], options.gpu, options.model, given[at + 1 :], options.task)
    os.chdir(ROOT)
    environment = dict(os.environ)
    if last[1].startswith("benchmarks/"):  # benchmarks import one another
        environment["PYTHONPATH"] = str(ROOT)
    for line in before:
        if status := subprocess.run(line, env=environment, check=False).returncode:
            return status
    os.execve(last[0], last, environment)  # replace this process, so that the script gets signals and the keyboard


if __name__ == "__main__":
    sys.exit(main())
