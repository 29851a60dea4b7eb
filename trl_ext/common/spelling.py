"""Spelling of flags and names."""

import difflib
import re
from collections.abc import Iterable


FLAG = re.compile(r"--[\w-]+")


def in_cell(text: str) -> str:
    """Return a text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("\n", " ")


def underscored(argv: Iterable[str]) -> list[str]:
    """Command line words with flags spelt like fields: `--model-name=a-b` becomes `--model_name=a-b`."""
    found = []
    for text in argv:
        name, equals, value = text.partition("=")
        found.append("--" + name[2:].replace("-", "_") + equals + value if FLAG.fullmatch(name) else text)
    return found


def did_you_mean(name: str, known: Iterable[str], mark: str = "") -> str:
    """`; did you mean a or b?` with the known names that begin with `name` or are close to it; empty if there is none."""
    known = sorted({each for each in known if "-" not in each})
    near = [each for each in known if each.startswith(name)][:3] if name else []
    near = near or difflib.get_close_matches(name, known, n=2, cutoff=0.7)
    return f"; did you mean {' or '.join(mark + each for each in near)}?" if near else ""
