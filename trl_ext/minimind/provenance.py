"""Record of what a stage's model was made from, and detection of later changes.

It holds the recipe, the configuration and the runs of the initial models, in the folder's `run.json`.
"""

import hashlib
import os
from pathlib import Path
from typing import Any

from ..common.run_folder import note, noted, run_id


ORIGIN = "made_from"


def origin(recipe: Path, config: Path, models: list[str]) -> dict[str, Any]:
    """The origin of a stage that starts now.

    Args:
        recipe: the stage's script.
        config: its configuration file.
        models: folders of the initial models, or hub ids, of which nothing is recorded.
    """
    # Absolute paths, because a later command may run in another folder
    runs = {str(folder.resolve()): run_id(folder) for folder in map(_run_folder, models) if folder.is_dir()}
    files = {str(file.resolve()): _hash(file) for file in (recipe, config)}
    return {"recipe": str(recipe.resolve()), "files": files, "runs": runs}


def remember(folder: Path, made_from: dict[str, Any]) -> None:
    """Store the origin with the run in this folder."""
    note(folder, **{ORIGIN: made_from})


def changes(model: str, later: frozenset[Path] = frozenset()) -> list[str]:
    """A sentence for each run behind this model that would turn out differently today, the latest first.

    Args:
        model: folder of a model.
        later: folders that have been visited; a folder may have been remade from its own descendant.
    """
    folder = _run_folder(model)
    if folder.resolve() in later:
        return []
    known = (noted(folder, ORIGIN) if folder.is_dir() else None) or {}
    found, earlier = [], []
    for file, before in known.get("files", {}).items():
        if Path(file).is_file() and _hash(Path(file)) != before:
            found.append(f"{os.path.relpath(file)} was edited since")
    for run, before in known.get("runs", {}).items():
        if run_id(run) not in (before, None):  # None: there is nothing to compare with
            found.append(f"{os.path.relpath(run)} was remade since")
        earlier += changes(run, later | {folder.resolve()})
    if found:
        remedy = f"{os.path.relpath(known['recipe'])} with --overwrite remakes it"
        found = [f"{folder} is of an earlier state ({', '.join(found)}); {remedy}"]
    return found + earlier


def _run_folder(model: str) -> Path:
    path = Path(model)
    return path.parent if path.name == "final" else path


def _hash(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:12]
