"""The files that contributors and tools read agree with the packages."""

import json
import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration

from patches import versions
from tests import corners


ROOT = Path(__file__).parents[1]
PACKAGES = ("patches", "unsloth_ext", "trl_ext")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
VERSION = PROJECT["version"]
LANES = ("latest", "oldest", "newest")


def pins(file: str) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements" / file).read_text().splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith("-r "))


def test_pre_commit_runs_the_ruff_that_make_lint_runs():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = (repo for repo in repos if repo["repo"].endswith("/ruff-pre-commit"))
    assert ruff["rev"] == f"v{pins('dev.txt')['ruff']}"


def ranges(*groups: list[str]) -> dict[str, str]:
    needs = [Requirement(line) for group in groups for line in group]
    return {need.name: need.specifier for need in needs if need.specifier}


def test_pins_are_within_the_ranges_of_the_package():
    """The ranges stand in pyproject.toml, the versions in requirements/: one for each package, in whichever files."""
    files = [pins(file.name) for file in (ROOT / "requirements").glob("*.txt") if file.stem not in LANES]
    pinned = {name: version for file in files for name, version in file.items()}
    assert all(pinned[name] == version for file in files for name, version in file.items())
    for name, allowed in ranges(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()).items():
        assert allowed.contains(pinned[name]), name


def test_the_oldest_tested_versions_are_the_starts_of_the_ranges():
    """And torch's newest end its own."""
    ours = ranges(PROJECT["dependencies"])
    for name, version in pins("oldest.txt").items():
        oldest = Version(version)
        before = f"{oldest.major}.{oldest.minor - 1}.99" if oldest.minor else f"{oldest.major - 1}.99"
        assert ours[name].contains(oldest) and not ours[name].contains(before), name
    newest = Version(pins("newest.txt")["torch"])
    assert ours["torch"].contains(newest) and not ours["torch"].contains(f"{newest.major}.{newest.minor + 1}")


def test_the_page_of_versions_is_what_was_found():
    """And these are the versions that requirements/ asks for."""
    found = json.loads(corners.RESULTS.read_text())
    assert corners.PAGE.read_text() == corners.page(found), "run make test-versions"
    for corner in corners.CORNERS:
        assert found[corner]["failed"] == 0 and found[corner]["passed"] > 500
        wanted = pins(f"{corner}.txt") | (pins("latest.txt") if corner == "newest" else {})
        installed = found[corner]["versions"]
        assert all(installed[name] == version for name, version in wanted.items() if name in installed)


def test_the_newest_tested_versions_are_the_ends_of_the_ranges():
    """Each is in its range, newer than the other lane's, and no later minor release is in the range."""
    ours = ranges(PROJECT["dependencies"])
    for name, version in pins("latest.txt").items():
        if name in ours:
            newest = Version(version)
            assert ours[name].contains(newest) and newest > Version(pins("core.txt")[name]), name
            following = f"{newest.major}.{newest.minor + 1}" if name != "datasets" else f"{newest.major + 1}"
            assert not ours[name].contains(following), name


def test_patches_are_held_to_the_ranges_of_the_package():
    extra = [line for name in ("unsloth", "vllm") for line in PROJECT["optional-dependencies"][name]]
    assert ranges(PROJECT["dependencies"], extra) == versions.TESTED
    assert ranges(extra).keys() == versions.OPTIONAL


@pytest.mark.parametrize(
    "file", ["Makefile", "README.md", ".ci/run", ".github/workflows/ci.yml", "patches/versions.py"]
)
def test_no_version_of_a_package_stands_elsewhere(file):
    assert not re.search(r"[=><~]=\s*\d", (ROOT / file).read_text())
    assert not any(version in (ROOT / file).read_text() for version in pins("unsloth.txt").values())


def test_python_versions_agree():
    (oldest,) = re.findall(
        r"sys.version_info < \((\d+), (\d+)\)", (ROOT / "requirements" / "check_python.py").read_text()
    )
    assert PROJECT["requires-python"] == f">={'.'.join(oldest)}"
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    assert workflow["jobs"]["test"]["strategy"]["matrix"]["python"][0] == ".".join(oldest)


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    assert re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == VERSION


def test_every_paper_of_a_trainer_is_cited():
    import trl_ext
    from trl_ext.hrpo.trainer import SOFT_PAPERS

    papers = {f"arXiv:{paper['id']}": (paper["title"], paper["citation"]) for paper in SOFT_PAPERS.values()}
    for name in trl_ext.__all__:
        if name.endswith("Trainer"):
            for part in getattr(trl_ext, name).__mro__:
                if part.__module__.startswith("trl_ext.") and "_paper" in vars(part):
                    papers[f"arXiv:{part._paper['id']}"] = part._paper["title"], part._paper["citation"]
    cited = {
        paper["identifiers"][0]["value"]: paper
        for paper in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    }
    assert cited.keys() == papers.keys() | {"arXiv:2509.20317"} and len(papers) > 5  # SIM-CoT is a term of several
    for number, (title, citation) in papers.items():
        authors = [f"{author['given-names']} {author['family-names']}" for author in cited[number]["authors"]]
        assert cited[number]["title"] == title and " and ".join(authors) in citation
        assert f"year = {cited[number]['year']}" in citation


@pytest.mark.parametrize("package", PACKAGES)
def test_the_packages_say_that_they_have_types(package, monkeypatch):
    """A wheel holds `py.typed`, without which type checkers take none of a package's annotations."""
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    apply_configuration(distribution, ROOT / "pyproject.toml")
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    build.manifest_files = {}  # which would be asked of a source distribution
    found = build.find_data_files(package, package)
    assert str(Path(package) / "py.typed") in found
    assert (str(Path(package) / "known_code.json") in found) == (package == "patches")


def test_the_image_is_set_up_as_a_checkout_is():
    """A Python that the package takes, the same make target, and no environment of this machine copied in."""
    text = (ROOT / "Dockerfile").read_text()
    (base,) = re.findall(r"^ARG BASE=python:(\d+\.\d+)-", text, re.MULTILINE)
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(base)
    assert "make setup GPU=" in text and 'ENTRYPOINT ["latent-reasoning"]' in text
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {".git", ".venv*", "runs"} <= set(ignored)
    done = subprocess.run(["make", "-n", "setup", "GPU=1"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
