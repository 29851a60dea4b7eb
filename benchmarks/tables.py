"""Write the Markdown page of every file in benchmarks/results/ again, from its data: python -m benchmarks.tables

The `TABLES` of each benchmark and of the sweep have a function for each of its result files.
"""

import importlib
import json
from pathlib import Path

from benchmarks import setups


def pages() -> dict[Path, str]:
    """The content of each Markdown page in benchmarks/results/."""
    found = {}
    here = Path(__file__).parent
    for module in (*sorted(here.glob("bench_*.py")), here / "sweep.py"):
        for name, table in importlib.import_module(f"benchmarks.{module.stem}").TABLES.items():
            for path in sorted(setups.RESULTS.glob(f"{name}_*.json")):
                if path.stem == f"{name}_{json.loads(path.read_text())['device']}":  # not a file with a longer name
                    found[path.with_suffix(".md")] = setups.page(path, table)
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
        print(path)
