"""The notebooks of docs/notebooks, cell by cell in a process of their own, with fewer steps."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
FEW = {"STEPS": 2, "WARM_START": 30, "HELD_OUT": 12}


def cells(file: Path, kind: str) -> list[str]:
    return ["".join(cell["source"]) for cell in json.loads(file.read_text())["cells"] if cell["cell_type"] == kind]


def run(file: Path, folder: Path, code: str) -> str:
    script = folder / "notebook.py"
    script.write_text(code)
    env = os.environ | {"MPLBACKEND": "Agg", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_every_cell_runs(tmp_path, file):
    code = "\n\n".join(cells(file, "code"))
    for name, few in FEW.items():
        code = re.sub(rf"^{name} = \d+", f"{name} = {few}", code, flags=re.MULTILINE)
    printed = run(file, tmp_path, code)
    kind = "hrpo" if "hrpo" in file.stem else "kava"
    assert (tmp_path / f"runs/notebook_{kind}/final/eval.png").is_file() and "accuracy (95% interval)" in printed
    assert ("states)" in printed) if kind == "hrpo" else (" -> " in printed)


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_with_its_own_steps_it_learns(tmp_path, file):
    """HRPO from below one half to above three quarters; KaVa's latent tokens answer twice as many as without them."""
    printed = run(file, tmp_path, "\n\n".join(cells(file, "code")))
    kind = "hrpo" if "hrpo" in file.stem else "kava"
    found = json.loads((tmp_path / f"runs/notebook_{kind}/final/eval.json").read_text())["results"]
    accuracy = {row["state"]: row["accuracy"] for row in found}
    if kind == "hrpo":
        before = json.loads((tmp_path / "runs/notebook_hrpo/summary.json").read_text())["accuracy_before"]
        assert before < 0.6 and accuracy["on"] > 0.75
    else:
        assert accuracy["on"] > 2 * accuracy["shuffle"], printed


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_it_begins_with_what_it_is_and_links_what_there_is(file):
    text = cells(file, "markdown")
    assert text[0].startswith("# ")
    for link in re.findall(r"\]\((\.\./[^)#]+)\)", "\n".join(text)):
        assert (file.parent / link).is_file(), link


def test_there_are_notebooks():
    assert len(NOTEBOOKS) == 2
