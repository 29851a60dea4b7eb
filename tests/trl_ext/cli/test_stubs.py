"""The stubs are what the records say, and lead an editor to where each public name is defined."""

import ast
import importlib

import pytest

from tests.test_house import ROOT
from trl_ext.cli import stubs
from unsloth_ext.common.generation_arguments import table


PACKAGES = ("unsloth_ext", "trl_ext")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_stub_is_what_the_records_say(package):
    assert (ROOT / package / "__init__.pyi").read_text() == stubs.stub(package)


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_defined_where_the_stub_says(package):
    """As a reader of source code sees it, without running any."""
    tree = ast.parse((ROOT / package / "__init__.pyi").read_text())
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert {node.names[0].name for node in imports} == set(importlib.import_module(package).__all__)
    for node in imports:
        module = ast.parse((ROOT / package / f"{node.module.replace('.', '/')}.py").read_text())
        defined = {name for statement in ast.walk(module) for name in names(statement)}
        assert node.names[0].name in defined, ast.unparse(node)


def names(statement: ast.AST) -> set[str]:
    if isinstance(statement, ast.ClassDef | ast.FunctionDef):
        return {statement.name}
    if isinstance(statement, ast.ImportFrom):
        return {alias.asname or alias.name for alias in statement.names}
    return {target.id for target in getattr(statement, "targets", ()) if isinstance(target, ast.Name)}


def test_a_stale_stub_fails_the_check(tmp_path, monkeypatch, capsys):
    for package in PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.pyi").write_text(stubs.stub(package))
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs" / "generation.md"
    page.write_text(stubs.generation_page())
    monkeypatch.setattr(stubs, "ROOT", tmp_path)
    monkeypatch.setattr("sys.argv", ["stubs", "--check"])
    assert stubs.main() == 0
    page.write_text("# Page\n\n| argument | old |\n|---|---|\n| `top_k` | refused |\n\nBehind it.\n")
    assert stubs.main() == 1 and "docs/generation.md" in capsys.readouterr().err
    (tmp_path / "trl_ext" / "__init__.pyi").write_text("")
    assert stubs.main() == 1 and "trl_ext/__init__.pyi" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["stubs"])
    assert stubs.main() == 0 and (tmp_path / "trl_ext" / "__init__.pyi").read_text() == stubs.stub("trl_ext")
    assert page.read_text() == f"# Page\n\n{table()}\nBehind it.\n"
