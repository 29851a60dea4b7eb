"""The files that contributors and tools read agree with the packages."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from setuptools import Distribution
from setuptools.config.pyprojecttoml import apply_configuration


ROOT = Path(__file__).parents[1]
PACKAGES = ("patches", "unsloth_ext", "trl_ext")
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def pins(file: str) -> dict[str, str]:
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements" / file).read_text().splitlines()]
    return dict(line.split("==") for line in lines if line)


def test_pre_commit_runs_the_ruff_that_make_lint_runs():
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    (ruff,) = (repo for repo in repos if repo["repo"].endswith("/ruff-pre-commit"))
    assert ruff["rev"] == f"v{pins('dev.txt')['ruff']}"


def test_the_version_is_the_same_everywhere():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    assert re.findall(r"^## \[([\d.]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0] == VERSION


def test_every_paper_of_a_trainer_is_cited():
    import trl_ext

    papers = {}
    for name in trl_ext.__all__:
        if name.endswith("Trainer"):
            for part in getattr(trl_ext, name).__mro__:
                if part.__module__.startswith("trl_ext.") and "_paper" in vars(part):
                    papers[f"arXiv:{part._paper['id']}"] = part._paper["title"], part._paper["citation"]
    cited = {
        paper["identifiers"][0]["value"]: paper
        for paper in yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"]
    }
    assert cited.keys() == papers.keys() and len(papers) > 5
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
    assert str(Path(package) / "py.typed") in build.find_data_files(package, package)
