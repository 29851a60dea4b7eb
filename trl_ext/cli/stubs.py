"""Stubs of the packages' lazy exports, from which editors complete names and type checkers know them.

python -m trl_ext.cli.stubs            # write unsloth_ext/__init__.pyi and trl_ext/__init__.pyi
python -m trl_ext.cli.stubs --check    # exit with status 1 if one of them is not what it would be
"""

import importlib
import sys
from pathlib import Path


ROOT = Path(__file__).parents[2]
HEAD = "# Written by `make format` from the methods' records (*/method.py), for editors and type checkers.\n"


def stub(package: str) -> str:
    """The text of a package's stub: one import for each public name."""
    where = importlib.import_module(package)._WHERE
    lines = [f"from .{module} import {name} as {name}" for name, module in where.items()]
    return HEAD + "\n".join(sorted(lines)) + "\n\n__all__: list[str]\n"


def main() -> int:
    """Write the stubs, or check them with `--check`. Return the exit status."""
    stale = []
    for package in ("unsloth_ext", "trl_ext"):
        file = ROOT / package / "__init__.pyi"
        if not file.is_file() or file.read_text() != stub(package):
            stale.append(file)
    if "--check" in sys.argv[1:]:
        for file in stale:
            print(f"{file.relative_to(ROOT)} is not what the records say; run `make format`", file=sys.stderr)
        return int(bool(stale))
    for file in stale:
        file.write_text(stub(file.parent.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
