"""How the tests run a recipe: in this process, as from a shell."""

import runpy
import sys
from pathlib import Path


RECIPES = Path(__file__).parents[2] / "recipes"


def run_recipe(monkeypatch, script, *argv) -> None:
    """Run `recipes/<script>` with these arguments."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    runpy.run_path(str(RECIPES / script), run_name="__main__")


def holds_no_pickle(folder) -> bool:
    """Return whether the folder of a saved model holds nothing but tensors, settings, a card and pictures."""
    kinds = {file.suffix for file in Path(folder).rglob("*") if file.is_file()}
    return kinds <= {".safetensors", ".json", ".md", ".jinja", ".png"}
