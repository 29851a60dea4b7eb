"""`latent-reasoning defaults METHOD`: each field that the method adds or changes, its default, and where that is from.

The sources stand in the configurations as `default_sources`, `{source: names of fields}`. A field that is not named
there is ours: it has no counterpart in the paper and the official code, or we measured another value.
"""

import dataclasses
import importlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from ..common.method import training_methods
from ..common.run_folder import PROGRAM
from .command_line import CommandLine
from .console import PlainConsole
from .train import method_name


OURS = "ours"


def configs() -> dict[str, str]:
    """The public name of the configuration of each method that has a trainer, by what `latent-reasoning train` calls it."""
    methods = training_methods().values()
    return {c.trains: m.trainers[c.trainer] for m in methods for c in m.commands if c.trainer}


def own_fields(config: type) -> Iterator[tuple[str, Any, str, str]]:
    """Name, default, source and help of each field that our classes declare.

    Args:
        config: a configuration.
    """
    fields = {field.name: field for field in dataclasses.fields(config)}
    ours = [cls for cls in config.__mro__ if cls.__module__.startswith("trl_ext.")]
    sources: dict[str, str] = {}
    for cls in ours[::-1]:
        for source, names in vars(cls).get("default_sources", {}).items():
            sources.update(dict.fromkeys(names, source))
    for name in dict.fromkeys(name for cls in ours[::-1] for name in inspect.get_annotations(cls)):
        if name in fields and fields[name].init:
            made = fields[name].default_factory
            default = fields[name].default if made is dataclasses.MISSING else made()
            yield name, default, sources.get(name, OURS), fields[name].metadata.get("help", "")


def parser() -> CommandLine:
    """The parser of this command."""
    made = CommandLine(prog=f"{PROGRAM} defaults", description=__doc__.partition("\n")[0])
    made.add_argument("method", type=method_name, choices=sorted(configs()), help="name of the method")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Return 0."""
    method = parser().parse_args(argv).method
    name = configs()[method]
    config = getattr(importlib.import_module("trl_ext"), name)
    parent = next(cls for cls in config.__mro__ if cls.__module__.startswith("trl."))
    table = Table(
        title=f"{name}: fields beyond {parent.__name__}'s, and those with another default", title_justify="left"
    )
    for heading in ("field", "default", "source", ""):
        table.add_column(heading, no_wrap=heading in ("field", "source"))
    for field, default, source, text in own_fields(config):
        blank = isinstance(default, str) and default != default.strip()
        table.add_row(field, repr(default) if blank else str(default), source, text)
    PlainConsole().print(table)
    return 0
