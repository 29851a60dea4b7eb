"""`latent-reasoning completion SHELL`: a script that completes commands, methods and flags in a shell.

    eval "$(latent-reasoning completion bash)"     # or write it where the shell looks for completions

The script needs no Python while it completes. It is made by shtab from the parsers themselves.
"""

import argparse
import contextlib
import importlib
import os
from collections.abc import Sequence

import shtab

from ..common.run_folder import PROGRAM
from .command_line import CommandLine
from .main import COMMANDS
from .parser import FlagsListed
from .train import run_recipe, training_commands


FILES = ("checkpoint", "config", "dataset", "eval_dataset", "init_from", "model_name", "output", "output_dir")


def parser() -> CommandLine:
    """The parser of this command."""
    made = CommandLine(prog=f"{PROGRAM} completion", description=__doc__)
    made.add_argument("shell", choices=shtab.SUPPORTED_SHELLS, help="the shell")
    return made


def all_parsers() -> argparse.ArgumentParser:
    """One parser with all commands. Recipes run until they have their parser."""
    whole = argparse.ArgumentParser(prog=PROGRAM)
    below = whole.add_subparsers()
    for name, (module, about) in COMMANDS.items():
        if name == "train":
            methods = below.add_parser(name, help=about).add_subparsers()
            for method, command in training_commands().items():
                known = [_flags_of(method)] if command.trainer else []
                methods.add_parser(method, help=command.about, parents=known, add_help=False)
        else:
            made = importlib.import_module(module).parser()
            below.add_parser(name, help=about, parents=[made], conflict_handler="resolve")
    return whole


def _flags_of(method: str) -> argparse.ArgumentParser:
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            run_recipe(training_commands()[method], ["--list_flags"])
        except FlagsListed as listed:
            for action in listed.parser._actions:
                if action.dest in FILES:
                    action.complete = shtab.FILE  # type: ignore[attr-defined]  # which shtab reads
            return listed.parser
    raise RuntimeError(f"the recipe of {method} has not parsed its flags")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the script. Return 0."""
    shell = parser().parse_args(argv).shell
    print(shtab.complete(all_parsers(), shell))
    return 0
