"""How the tests run a recipe: in this process, as from a shell."""

import runpy
import sys
from pathlib import Path


RECIPES = Path(__file__).parents[2] / "recipes"


def run_recipe(monkeypatch, script, *argv) -> None:
    """Run `recipes/<script>` with these arguments."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
    runpy.run_path(str(RECIPES / script), run_name="__main__")
