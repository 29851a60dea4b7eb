"""Files that are generated from the methods' records.

They are stubs of the packages' lazy exports, for editors and type checkers, and the table of docs/generation.md.

python -m trl_ext.cli.stubs            # write them
python -m trl_ext.cli.stubs --check    # exit with status 1 if one of them is out of date
"""

import importlib
import sys
from pathlib import Path

from unsloth_ext.common.generation_arguments import table


ROOT = Path(__file__).parents[2]
HEAD = "# Written by `make format` from the methods' records (*/method.py), for editors and type checkers.\n"


def stub(package: str) -> str:
    """The text of a package's stub: one import for each public name."""
    where = importlib.import_module(package)._WHERE
    # In the order of ruff: classes before functions
    names = sorted(where, key=lambda name: (where[name], name[0].islower(), name.lower()))
    lines = [f"from .{where[name]} import {name} as {name}" for name in names]
    return HEAD + "\n".join(lines) + "\n\n__all__: list[str]\n"


def generation_page() -> str:
    """The text of docs/generation.md, with a table of the current records."""
    before, _, rest = (ROOT / "docs" / "generation.md").read_text().partition("| argument |")
    after = rest.partition("\n\n")[2]
    return f"{before}{table()}\n{after}".rstrip() + "\n"


def main() -> int:
    """Write the files, or check them with `--check`. Return the exit status."""
    wanted = {ROOT / package / "__init__.pyi": stub(package) for package in ("unsloth_ext", "trl_ext")}
    wanted[ROOT / "docs" / "generation.md"] = generation_page()
    stale = [file for file, text in wanted.items() if not file.is_file() or file.read_text() != text]
    if "--check" in sys.argv[1:]:
        for file in stale:
            print(f"{file.relative_to(ROOT)} is out of date; run `make format`", file=sys.stderr)
        return int(bool(stale))
    for file in stale:
        file.write_text(wanted[file])
    return 0


if __name__ == "__main__":
    sys.exit(main())
