"""The screen: the one place where a rich console is made. What is printed often comes from outside, from data, paths and
models, so nothing is markup and no word is an emoji; paths are never broken, so that they can be copied."""

import os
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


LOG_WIDTH = 160  # columns of a table in a file, which has no width of its own


class PlainConsole(Console):
    """A rich console that prints what it is given letter by letter.

    Args:
        quiet: print nothing, as the ranks behind the first do.
    """

    def __init__(self, quiet: bool = False):
        super().__init__(markup=False, emoji=False, highlight=False, quiet=quiet)
        if not self.is_terminal and "COLUMNS" not in os.environ:
            self.width = LOG_WIDTH

    def print(self, *objects: Any, **how: Any) -> None:
        """As rich's, but text stays on one line, and so does a table's title."""
        for each in objects:
            if isinstance(each, Table) and isinstance(each.title, str):
                super().print(Text(each.title, style="italic"), soft_wrap=True)
                each.title = None
        if all(isinstance(each, str | Text) for each in objects):
            how.setdefault("soft_wrap", True)
        super().print(*objects, **how)
