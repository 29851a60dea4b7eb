"""Fingerprints of upstream code, read from its files without importing it."""

import ast
import functools
import hashlib
import importlib.util
from pathlib import Path


DIGITS = 12


def installed(place: str) -> str:
    """Return the fingerprint of installed code: the first 12 hex digits of the SHA-256 of its source text with
    decorators.

    Args:
        place: `"package/folder/file.py:name"`. A method is `Class.method`.

    Returns:
        The fingerprint, or an empty string if the package, the file or the name is missing.
    """
    file, _, name = place.partition(":")
    source = _sources(file).get(name)
    return "" if source is None else hashlib.sha256(source.encode()).hexdigest()[:DIGITS]


@functools.cache
def _sources(file: str) -> dict[str, str]:
    """Return the source text of every function, class and method of a file, by name."""
    package, _, rest = file.partition("/")
    spec = importlib.util.find_spec(package)  # for a top-level package this imports nothing
    path = Path(spec.submodule_search_locations[0], rest) if spec and spec.submodule_search_locations else None
    if path is None or not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    lines, found = text.splitlines(keepends=True), {}

    def read(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
                found[prefix + node.name] = "".join(lines[start - 1 : node.end_lineno])
            if isinstance(node, ast.ClassDef):
                read(node.body, f"{prefix}{node.name}.")

    read(ast.parse(text).body, "")
    return found
