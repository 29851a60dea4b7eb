"""The house: what imports what, what lands in site-packages, how heavy an import is."""

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import distribution, version
from pathlib import Path

import pytest
from setuptools import find_packages


ROOT = Path(__file__).parents[1]
PACKAGES = ("patches", "unsloth_ext", "trl_ext")


def imported(file: Path) -> set[str]:
    """First parts of the absolute imports in a file."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize(
    "package, forbidden",
    [("patches", {"unsloth_ext", "trl_ext"}), ("unsloth_ext", {"trl_ext"}), ("trl_ext", {"recipes"})],
)
def test_arrows_go_one_way(package, forbidden):
    for file in (ROOT / package).rglob("*.py"):
        assert not imported(file) & (forbidden | {"tests", "benchmarks", "recipes"}), file


SHARED = {"common", "cli", "tasks", "evaluation"}
# Who builds on whom, and why
BUILDS_ON = {
    ("latent", "kv_compression"),  # KaVa learns from the keys of a trace that R-KV's scores choose
    ("tasks", "hrpo"),  # evaluations decode with thinking states where a model has them
}


def test_methods_import_what_is_shared_and_not_each_other():
    found = set()
    for package in ("unsloth_ext", "trl_ext"):
        for file in (ROOT / package).rglob("*/*.py"):
            own = file.relative_to(ROOT / package).parts[0]
            for node in ast.walk(ast.parse(file.read_text())):
                if not isinstance(node, ast.ImportFrom):
                    continue
                inside = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
                parts = (*inside, *(node.module or "").split("."))
                if parts[0] in ("unsloth_ext", "trl_ext") and len(parts) > 1:
                    found.add((own, parts[1]))
    assert {(own, other) for own, other in found if own != other and other not in SHARED} == BUILDS_ON


@pytest.mark.parametrize(
    "folder, below",
    [
        ("common", set()),
        ("cli", {"common"}),
        ("tasks", {"common", "cli"}),
        ("evaluation", {"common", "cli", "tasks"}),
    ],
)
def test_what_methods_share_stands_in_layers(folder, below):
    """Each imports the ones below it, and no method."""
    for file in (ROOT / "trl_ext" / folder).glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                module = ("trl_ext." if node.level == 2 else "") + (node.module or "")
                if module.startswith("trl_ext."):
                    assert module.split(".")[1] in below | {folder}, f"{file}: {module}"


def test_only_our_three_packages_are_installed():
    import tomllib

    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]
    packages = find_packages(ROOT, **find)
    on_disk = {".".join(f.parent.relative_to(ROOT).parts) for p in PACKAGES for f in (ROOT / p).rglob("*.py")}
    assert set(packages) == on_disk
    assert distribution("latent-reasoning-trl").version
    assert not (ROOT / "recipes" / "__init__.py").exists()


def test_a_wheel_holds_the_recipes_and_their_configurations(tmp_path):
    """And nothing else beside the packages. Another folder than this one, because a build leaves files behind."""
    for name in (*PACKAGES, "recipes", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    wheel = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", "dist", "."]
    done = subprocess.run(wheel, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (made,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(made) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        assert "latent-reasoning = trl_ext.cli.main:main" in archive.read(entry_points).decode()
    here = {str(f.relative_to(ROOT)) for p in (*PACKAGES, "recipes") for f in (ROOT / p).rglob("*.*") if f.is_file()}
    here = {name for name in here if name.endswith((".py", ".yaml", ".json"))}
    assert {f"trl_ext/{name}" if name.startswith("recipes/") else name for name in here} == {
        name for name in names if not name.endswith((".pyi", "py.typed"))
    }


@pytest.mark.skipif(Path(sys.prefix) != ROOT / ".venv", reason="not the environment that make sets up")
@pytest.mark.parametrize("file", ["core.txt", "dev.txt"])
def test_what_is_installed_is_what_is_pinned(file):
    """Two pins that contradict each other would make pip change one of them in silence."""
    pins = [line.partition("#")[0].strip() for line in (ROOT / "requirements" / file).read_text().splitlines()]
    pins = dict(pin.split("==") for pin in pins if pin)
    assert {name: version(name).partition("+")[0] for name in pins} == pins


def python(code: str, *, cwd) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_recipes_are_not_importable_from_elsewhere(tmp_path):
    done = subprocess.run([sys.executable, "-c", "import recipes"], cwd=tmp_path, capture_output=True, check=False)
    assert done.returncode != 0


def test_importing_a_package_loads_nothing_heavy(tmp_path):
    heavy = ["torch", "transformers", "trl", "peft", "datasets", "unsloth"]
    code = f"import sys, patches, unsloth_ext, trl_ext; print([m for m in {heavy} if m in sys.modules])"
    assert python(code, cwd=tmp_path).strip() == "[]"


NEEDS_VLLM = "unsloth_ext.hrpo.vllm."
NEEDS_LM_EVAL = ("trl_ext.evaluation.harness", "trl_ext.evaluation.lm_eval_model", "trl_ext.evaluation.run")


def test_works_with_no_optional_package_installed(tmp_path):
    """Unsloth, bitsandbytes, vLLM and lm-eval hidden from the import system: every module that is not for them imports."""
    code = """
import sys
hidden = ('unsloth', 'unsloth_zoo', 'bitsandbytes', 'vllm', 'lm_eval')
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in hidden:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)
sys.meta_path.insert(0, Hide())
import importlib.util, pkgutil
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split('.')[0] in hidden else real(name, *a)
import patches, trl_ext, unsloth_ext
failed = []
for package in (patches, unsloth_ext, trl_ext):
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):
        if module.name.startswith('trl_ext.recipes') or module.name.endswith('__main__'):
            continue
        try:
            importlib.import_module(module.name)
        except ModuleNotFoundError as error:
            assert error.name.split('.')[0] in hidden, error
            failed.append(module.name)
from unsloth_ext.common.backend import unsloth_can_run
assert unsloth_can_run() == (False, 'unsloth is not installed')
assert not set(hidden) & set(sys.modules)
import trl
from trl_ext import HRPOTrainer
assert issubclass(HRPOTrainer, trl.GRPOTrainer) and trl.GRPOTrainer.__module__.startswith('trl.')
print(*failed)
"""
    failed = python(code, cwd=tmp_path).split()
    assert not [name for name in failed if not name.startswith(NEEDS_VLLM) and name not in NEEDS_LM_EVAL]


def test_every_public_name_resolves():
    import patches
    import trl_ext
    import unsloth_ext

    for package in (patches, unsloth_ext, trl_ext):
        for name in package.__all__:
            assert getattr(package, name) is not None
        with pytest.raises(AttributeError, match="no_such_name"):
            package.no_such_name  # noqa: B018


@pytest.mark.parametrize("folder", [*PACKAGES, "recipes", "benchmarks", "tests"])
def test_the_formatter_formats_all_of_the_code(folder):
    for file in (ROOT / folder).rglob("*.py"):
        assert not re.search(r"#\s*fmt:", file.read_text()), file


def test_every_public_name_has_a_docstring_of_its_own():
    import patches
    import trl_ext
    import unsloth_ext

    for package in (patches, unsloth_ext, trl_ext):
        for name in set(package.__all__) - {"NAMES"}:
            text = getattr(package, name).__doc__  # a class does not inherit its parent's
            assert text and not text.startswith(f"{name}("), name  # as dataclasses begin the one that they make


SCREEN = ROOT / "trl_ext" / "cli" / "console.py"


@pytest.mark.parametrize("folder", [*PACKAGES, "recipes", "benchmarks"])
def test_nothing_is_printed_as_markup(folder):
    """One module makes the console. A panel's title is markup whatever the console says, so it has to be a `Text`."""
    for file in (ROOT / folder).rglob("*.py"):
        if file == SCREEN:
            continue
        tree = ast.parse(file.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                names = {alias.name for alias in node.names}
                assert node.module not in ("rich.console", "rich.markup", "rich.prompt", "rich.progress"), file
                assert node.module != "rich" or not names & {"print", "inspect", "get_console", "console"}, file
            if not isinstance(node, ast.Call):
                continue
            how = {keyword.arg: keyword.value for keyword in node.keywords}
            assert "markup" not in how and getattr(node.func, "attr", "") != "from_markup", f"{file}:{node.lineno}"
            if getattr(node.func, "id", "") == "Panel":
                for name in how.keys() & {"title", "subtitle"}:
                    assert not isinstance(how[name], ast.Constant | ast.JoinedStr), f"{file}:{node.lineno}"
