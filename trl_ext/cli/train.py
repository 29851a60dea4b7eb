"""`latent-reasoning train METHOD [--config FILE] [--field value ...]`: run the method's recipe in this process.

With `accelerate launch` or `torchrun`, give `-m trl_ext train METHOD` in place of a script. `--config` takes a file, or
the name of a configuration that comes with the recipe, such as `hrpo_gsm8k`.
"""

import sys
import types
from collections.abc import Sequence
from pathlib import Path

from ..common.method import Command, commands
from ..common.run_folder import PROGRAM
from ..common.spelling import did_you_mean


def recipes() -> Path:
    """The folder of the recipes: that of a checkout, or the copy in an installed wheel."""
    inside = Path(__file__).parents[1] / "recipes"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "recipes"


def training_commands() -> dict[str, Command]:
    """What `latent-reasoning train` can run, by name."""
    return {command.trains: command for command in commands().values() if command.trains}


def run_recipe(command: Command, flags: Sequence[str]) -> None:
    """Run the script of a command as `python SCRIPT` would. It sees the command line of `latent-reasoning`.

    Args:
        command: one of `training_commands()`.
        flags: the words after the method's name.
    """
    (script,) = command.scripts
    file = recipes() / Path(script).relative_to("recipes")
    sys.argv = [f"{PROGRAM} train {command.trains}", *command.arguments, *flags]
    main = types.ModuleType("__main__")
    main.__file__ = str(file)
    sys.modules["__main__"] = main  # where dataclasses and pickles look for the script's classes
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), vars(main))


def method_name(text: str) -> str:
    """A method's name as `train` knows it: `KV_Distill` is `kv-distill`."""
    return text.replace("_", "-").lower()


def usage() -> str:
    """The text of `latent-reasoning train --help`."""
    lines = [f"usage: {PROGRAM} train METHOD [--config FILE] [--field value ...]", ""]
    for name, command in training_commands().items():
        lines.append(f"  {name:16}{command.what or command.about.partition(';')[0]}")
    more = "Without flags a method trains its embedded default on a CPU. `train METHOD --help` shows its flags."
    return "\n".join([*lines, "", more])


def main(argv: Sequence[str]) -> int:
    """Train. Return 0.

    Raises:
        ValueError: there is no such method.
    """
    name, *flags = argv or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    known, wanted = training_commands(), method_name(name)
    if wanted not in known:
        near = did_you_mean(wanted.replace("-", "_"), [each.replace("-", "_") for each in known]).replace("_", "-")
        raise ValueError(f"{name}: there is no such method{near}; `{PROGRAM} train --help` lists them")
    run_recipe(known[wanted], flags)
    return 0
