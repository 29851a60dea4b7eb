"""`latent-reasoning methods`: a table of the methods."""

from collections.abc import Sequence

from rich.table import Table

from ..common.method import commands
from ..common.run_folder import PROGRAM
from .command_line import CommandLine
from .console import PlainConsole


def parser() -> CommandLine:
    """The parser of this command."""
    return CommandLine(prog=f"{PROGRAM} methods", description="The methods and what was measured of them.")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table. Return 0."""
    parser().parse_args(argv)
    table = Table(show_lines=True)
    for heading in ("method", "what it does", "paper", "in place of TRL's", "evidence"):
        table.add_column(heading, no_wrap=heading in ("method", "paper"))
    for command in commands().values():
        if command.trainer:
            paper = f"arXiv {command.paper}" if command.paper else "ours"
            table.add_row(command.trains, command.what, paper, command.parent, command.evidence)
    console = PlainConsole()
    console.print(table)
    console.print("Evidence: accuracy on the embedded tasks. `latent-reasoning train METHOD` trains one.")
    return 0
