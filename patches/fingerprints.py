"""Fingerprints of upstream code, read from its files without importing it.

`known_code.json` has those of tested code; `patches/touched.py` writes it.
"""

import ast
import functools
import hashlib
import importlib.util
import io
import json
import tokenize
from pathlib import Path


DIGITS = 12
KNOWN = Path(__file__).with_name("known_code.json")


def installed(place: str) -> str:
    """Return the fingerprint of installed code: the first 12 hex digits of the SHA-256 of its source text.

    Decorators count. Comments, docstrings, what annotations say, and empty lines do not.

    Args:
        place: `"package/folder/file.py:name"`. A method is `Class.method`.

    Returns:
        The fingerprint, or an empty string if the package, the file or the name is missing.
    """
    file, _, name = place.partition(":")
    source = _sources(file).get(name)
    return "" if source is None else hashlib.sha256(source.encode()).hexdigest()[:DIGITS]


def contains(file: str, text: str) -> bool:
    """Return whether an installed file contains a text.

    Args:
        file: `"package/folder/file.py"`.
        text: on one line.
    """
    path = _path(file)
    return path is not None and text in path.read_text(encoding="utf-8", errors="replace")


@functools.cache
def known() -> dict[str, dict[str, str]]:
    """By place, the fingerprints of tested code, each with the version of its package that was first recorded with it."""
    return json.loads(KNOWN.read_text())


def change(place: str) -> str | None:
    """Return what differs from tested code at a place, in one sentence; None if nothing does."""
    found, tested = installed(place), known().get(place, {})
    if found in tested:
        return None
    if not found:
        return f"{place} is not there any more"
    return f"{place} has the fingerprint {found}, and tested code {' or '.join(tested) or 'none'}"


def _path(file: str) -> Path | None:
    """Return the place of an installed file `"package/folder/file.py"`, without importing it; None if it is missing."""
    package, _, rest = file.partition("/")
    spec = importlib.util.find_spec(package)  # for a top-level package this imports nothing
    path = Path(spec.submodule_search_locations[0], rest) if spec and spec.submodule_search_locations else None
    return path if path is not None and path.is_file() else None


@functools.cache
def _sources(file: str) -> dict[str, str]:
    """Return the code of every function, class and method of a file, by name."""
    path = _path(file)
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
        module = ast.parse(text)
    except (SyntaxError, UnicodeDecodeError):  # of a newer Python, or no source
        return {}
    lines, found = _bare_lines(text, module), dict[str, str]()

    def read(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                code = lines[start - 1 : node.end_lineno]
                found[prefix + node.name] = "\n".join(line for line in code if line)
            if isinstance(node, ast.ClassDef):
                read(node.body, f"{prefix}{node.name}.")

    read(module.body, "")
    return found


def _bare_lines(text: str, module: ast.Module) -> list[str]:
    """Return the lines of a file without comments, docstrings and annotations."""
    lines = [line.encode() for line in text.split("\n")]  # ast counts bytes
    for first, start, last, end in sorted([*_comments(text, lines), *_not_run(module)], reverse=True):
        lines[first] = lines[first][:start] + lines[last][end:]
        lines[first + 1 : last + 1] = [b""] * (last - first)
    return [line.decode().rstrip() for line in lines]


Span = tuple[int, int, int, int]  # first line and byte, last line and the byte after; lines from 0


def _comments(text: str, lines: list[bytes]) -> list[Span]:
    spans = []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row = token.start[0] - 1
            start = len(lines[row].decode()[: token.start[1]].encode())
            spans.append((row, start, row, len(lines[row])))
    return spans


def _not_run(module: ast.Module) -> list[Span]:
    """Return the places of docstrings, and of annotations."""
    nodes: list[ast.expr] = []
    for node in ast.walk(module):
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
            nodes.append(node.annotation)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
            nodes.append(node.returns)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = node.body[0]
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                nodes.append(first.value)
    return [(node.lineno - 1, node.col_offset, (node.end_lineno or 0) - 1, node.end_col_offset or 0) for node in nodes]
