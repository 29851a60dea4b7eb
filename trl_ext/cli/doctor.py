"""`latent-reasoning doctor`: versions found and tested, the backend and why it was chosen, and the patches that apply.

The exit status is 1 if a version is refused, unless the override is set: one that is older than the tested ones, or newer
with other code where this project changes or relies on it. Upstream code that differs from tested code gives a warning.
"""

import importlib.util
from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

import patches
from patches import versions
from unsloth_ext.common.backend import unsloth_can_run

from ..common.run_folder import PROGRAM
from .command_line import CommandLine
from .console import PlainConsole


def parser() -> CommandLine:
    """The parser of this command."""
    return CommandLine(prog=f"{PROGRAM} doctor", description=__doc__)


def main(argv: Sequence[str] | None = None) -> int:
    """Print versions, the backend and patches. Return 1 for an untested version without the override, else 0."""
    parser().parse_args(argv)
    console = PlainConsole()
    problems = {package: problem for package in versions.TESTED if (problem := versions.version_problem(package))}
    _versions_table(console, problems)
    use_unsloth, why = unsloth_can_run()
    console.print(f"backend: {'unsloth' if use_unsloth else 'transformers + peft'} ({why})")
    _patches_list(console, use_unsloth)
    for status in patches.status().values():
        for warning in status.warnings:
            console.print(f"warning: {warning}; read the upstream code and record its fingerprint", style="yellow")
    notes = [note for package in versions.TESTED if (note := versions.newer_note(package))]
    for note in notes:
        console.print(note, style="yellow")
    if not problems:
        if not notes:
            console.print("all versions are tested", style="green")
        return 0
    console.print(next(iter(problems.values())), style="red")
    if versions.untested_allowed():
        console.print(f"{versions.ALLOW_UNTESTED}=1: continuing untested")
        return 0
    console.print(f"Set {versions.ALLOW_UNTESTED}=1 to continue untested.")
    return 1


def _versions_table(console: PlainConsole, problems: dict[str, str]) -> None:
    table = Table(title="versions", title_justify="left")
    for heading in ("package", "found", "tested", ""):
        table.add_column(heading)
    for package, wanted in versions.TESTED.items():
        found = versions.installed_version(package)
        state: str | Text = "ok" if found else "not installed (optional)"
        if package in problems:
            state = Text("untested", style="red")
        elif versions.is_newer(package):
            state = Text("newer", style="yellow")
        table.add_row(package, str(found or "-"), str(wanted), state)
    console.print(table)


def _patches_list(console: PlainConsole, use_unsloth: bool) -> None:
    """Print patches line by line. A table would break the names of what they replace."""
    for used in (True, False):
        console.print("patches that are used here" if used else "patches that are not used here")
        for name in patches.NAMES:
            patch = patches.get(name)
            applies = patch.package not in ("unsloth", "unsloth_zoo") or use_unsloth
            if used == (applies and importlib.util.find_spec(patch.package) is not None):
                console.print(f"  {name}{' (temporarily)' if patch.scoped else ''}: {patch.reason}")
                console.print(f"    in {patch.target}")
