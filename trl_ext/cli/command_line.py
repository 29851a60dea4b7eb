"""A command line with full flag names in either spelling and readable errors."""

import argparse
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from trl_ext.common.spelling import did_you_mean, underscored


MOST_CHOICES = 250  # longer lists are not shown
TRUTHS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


class CommandLine(argparse.ArgumentParser):
    """`argparse` without abbreviations: `--model_n` is an error that suggests `--model_name`.

    `--model-name` and `--model_name` are the same flag.

    Raises:
        ValueError: from `parse_args` and `parse_known_args`, where argparse would print its usage and exit.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        return super().add_argument(*underscored(names), **kwargs)

    def add_switch(self, name: str, help: str) -> argparse.Action:
        """Add a flag that is on if it is given, alone or as `--name true`."""
        return self.add_argument(
            name, nargs="?", const=True, default=False, type=_truth, metavar="true|false", help=help
        )

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, others = self.parse_known_args(args, namespace)
        self.refuse(others)
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        return super().parse_known_args(underscored(sys.argv[1:] if args is None else args), namespace)

    def error(self, message: str) -> NoReturn:
        said, _, choices = message.removeprefix("argument ").partition(" (choose from ")
        if len(choices) > MOST_CHOICES:
            value = said.rpartition("'")[0].rpartition("'")[2]
            near = did_you_mean(value, re.findall(r"'([^']*)'", choices))
            raise ValueError(said + (near or "; --help_all lists the choices"))
        raise ValueError(message.removeprefix("argument "))

    def refuse(self, others: Sequence[str]) -> None:
        """Raise a ValueError for the first word that no flag has accepted."""
        for other in others:
            if not other.startswith("--"):
                raise ValueError(f"{other}: neither a flag nor the value of a flag; write flags as --name value")
            name = other[2:].partition("=")[0]
            known = [option[2:] for action in self._actions for option in action.option_strings]
            raise ValueError(f"--{name}: there is no such flag{did_you_mean(name, known, '--')}")


def _truth(text: str) -> bool:
    if text.lower() not in TRUTHS:
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return TRUTHS[text.lower()]
