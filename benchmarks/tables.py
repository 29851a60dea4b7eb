"""Write the Markdown page of every file in benchmarks/results/ again, from its figures: python -m benchmarks.tables

Each benchmark's `TABLES` has a function for each of its files of results.
"""

import importlib
import json
from pathlib import Path

from benchmarks import setups


def pages() -> dict[Path, str]:
    """What each Markdown page in benchmarks/results/ must hold."""
    found = {}
    for module in sorted(Path(__file__).parent.glob("bench_*.py")):
        for name, table in importlib.import_module(f"benchmarks.{module.stem}").TABLES.items():
            for path in sorted(setups.RESULTS.glob(f"{name}_*.json")):
                if path.stem == f"{name}_{json.loads(path.read_text())['device']}":  # and not a longer name
                    found[path.with_suffix(".md")] = setups.page(path, table)
    return found


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
        print(path)
