"""Output to the terminal: the only place that creates a rich console.

Output often contains text from outside, such as data, paths and model names. So nothing is read as markup or emoji, and
paths are never broken across lines, so that they can be copied.
"""

import os
import sys
from typing import Any, NoReturn

from rich.console import Console
from rich.table import Table
from rich.text import Text


LOG_WIDTH = 160  # width of tables in a file, which has no width itself


def leave_pipe() -> NoReturn:
    """End the program after a pipe's reader has left. What is still buffered goes nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(0)


class PlainConsole(Console):
    """A rich console that prints text unchanged.

    Args:
        quiet: print nothing, as on all ranks but the first.
    """

    def __init__(self, quiet: bool = False):
        super().__init__(markup=False, emoji=False, highlight=False, quiet=quiet)
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = LOG_WIDTH

    def on_broken_pipe(self) -> None:
        """Leave without a word if the reader of a pipe has left, as `head` does."""
        leave_pipe()

    def print(self, *objects: Any, **how: Any) -> None:
        """Print like rich, but keep each text and each title of a table on one line."""
        for each in objects:
            if isinstance(each, Table) and isinstance(each.title, str):
                super().print(Text(each.title, style="italic"), soft_wrap=True)
                each.title = None
        if all(isinstance(each, str | Text) for each in objects):
            how.setdefault("soft_wrap", True)
        super().print(*objects, **how)
