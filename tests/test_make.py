"""What make does before it downloads anything, in a copy with made-up Pythons."""

import os
import re
import shutil
import subprocess
import venv
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


@pytest.fixture
def make(tmp_path):
    """Runs make in a folder with the Makefile and the files that a set-up depends on."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    for name in ("pyproject.toml", "setup.py"):
        (tmp_path / name).write_text("")

    # as from a shell: a make that runs the tests tells makes below it to name their folders
    outside = {
        name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS", "PYTHONPATH"))
    }

    def run(*arguments, **environment):
        return subprocess.run(
            ["make", *arguments],
            cwd=tmp_path,
            env={**outside, **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    return run


def python(path: Path, recent: bool) -> Path:
    """A script in place of Python: writes down what it is asked for, makes virtual environments, installs nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""#!/bin/sh
case "$1" in *check_python.py) exit {0 if recent else 1};; esac
echo "$@" >> "{path}.log"
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
exit 0
"""
    )
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("kind", ["old", "missing"])
def test_a_python_that_will_not_do_is_refused_before_anything_is_downloaded(make, tmp_path, kind):
    path = python(tmp_path / "old" / "python", False) if kind == "old" else tmp_path / "none"
    done = make("setup", f"PYTHON={path}")
    assert done.returncode and "older than Python 3.11" in done.stderr and "PYTHON=python3.11" in done.stderr
    assert not (tmp_path / ".venv").exists() and not Path(f"{path}.log").exists()


@pytest.mark.parametrize("left", ["dangling", "nothing", "old"])
def test_a_stamp_without_a_python_that_runs_is_repaired(make, tmp_path, left):
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / ".venv" / ".ready").touch()
    if left == "dangling":
        (tmp_path / ".venv" / "bin" / "python").symlink_to(tmp_path / "gone")
    elif left == "old":
        python(tmp_path / ".venv" / "bin" / "python", False)
    good = python(tmp_path / "good" / "python", True)
    done = make("setup", f"PYTHON={good}")
    assert done.returncode == 0, done.stderr
    assert "setting it up anew" in done.stdout and "-m venv .venv" in Path(f"{good}.log").read_text()
    again = make("setup", f"PYTHON={good}")
    assert again.returncode == 0 and not again.stdout


@pytest.mark.parametrize("where, right", [("here", True), ("another checkout", False), ("nowhere", False)])
def test_a_checkout_that_was_moved_or_copied_is_set_up_anew(make, tmp_path, where, right):
    """Its .venv has a Python that runs, with the packages of the old place."""
    for place in ("here", "another checkout"):
        package = (tmp_path if place == "here" else tmp_path / place) / "unsloth_ext"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
    venv.create(tmp_path / ".venv", symlinks=True)
    (packages,) = (tmp_path / ".venv").glob("lib/python*/site-packages")
    (packages / "ours.pth").write_text(str(tmp_path if where == "here" else tmp_path / where) + "\n")
    (tmp_path / ".venv" / ".ready").touch()
    done = make("-n", "setup", PYTHONPATH=str(tmp_path / "another checkout"))  # says nothing of what is installed
    assert done.returncode == 0 and ("setting it up anew" not in done.stdout) == right, done.stderr
    assert ("install -q" in done.stdout) != right


@pytest.mark.parametrize("kind", ["recent", "old", "missing"])
@pytest.mark.parametrize("place", ["venv", "outside"])
def test_help_lists_the_targets_with_any_python(make, tmp_path, kind, place):
    path = tmp_path / ".venv" / "bin" / "python" if place == "venv" else tmp_path / "python"
    if kind != "missing":
        python(path, kind == "recent")
    done = make("help", f"PYTHON={tmp_path / 'python'}")
    assert done.returncode == 0 and not done.stderr and "make doctor" in done.stdout
    if kind == "recent":
        assert "-m trl_ext.cli.targets" in Path(f"{path}.log").read_text() and "newer lists" not in done.stdout
    else:
        assert "Python 3.11 or newer lists" in done.stdout


def test_cleaning_leaves_the_runs(make, tmp_path):
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / ".venv").mkdir()
    assert make("clean").returncode == 0
    assert (tmp_path / "runs" / "mine").exists() and not (tmp_path / ".venv").exists()
    assert make("clean-runs").returncode == 0 and not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "target", ["minimind", "train-hrpo-two-stage", "bench-hrpo", "eval-latent", "profile-alignment"]
)
def test_arguments_reach_the_command_line(make, tmp_path, target):
    python(tmp_path / ".venv" / "bin" / "python", True)
    (tmp_path / ".venv" / ".ready").touch()
    (tmp_path / "runs" / "minimind").mkdir(parents=True)
    assert make(target, "ARGS=--x", "MODEL=m").returncode == 0
    wanted = f"-m trl_ext.cli.targets {target} --model m -- --x"
    assert wanted in (tmp_path / ".venv" / "bin" / "python.log").read_text()
    assert (tmp_path / "runs" / "minimind").exists()


def test_a_name_with_spaces_is_one_argument(make, tmp_path):
    script = python(tmp_path / ".venv" / "bin" / "python", True)
    script.write_text(script.read_text().replace('echo "$@"', "printf '<%s>' \"$@\""))
    (tmp_path / ".venv" / ".ready").touch()
    assert make("train-hrpo", "MODEL=my model", """ARGS=--x "a b" 'c "d'""").returncode == 0
    said = (tmp_path / ".venv" / "bin" / "python.log").read_text()
    assert said.endswith('<--model><my model><--><--x><a b><c "d>'), said


def test_every_test_of_vllm_is_in_a_folder_that_is_run():
    folders = re.findall(r"^VLLM_(?:HRPO|REST) := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    folders = " ".join(folders).split()
    files = [file for file in (ROOT / "tests").rglob("test_*.py") if "mark.vllm" in file.read_text()]
    names = {file.relative_to(ROOT).as_posix() for file in files} - {"tests/test_make.py"}
    assert len(names) > 8
    assert all(any(name.startswith(folder) for folder in folders) for name in names)
