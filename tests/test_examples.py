"""The examples of README and the pages run word for word, in order and in one namespace a page.

One that needs a hub or a GPU stands behind `<!-- skip: next "why" -->`. It is compiled, and what it imports must be there.
"""

import ast
import contextlib
import importlib.util
import os
import runpy
import shlex
import shutil
import subprocess
import sys
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from unittest import SkipTest

import pytest
from sybil import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

import patches
from trl_ext.cli.main import COMMANDS as COMMANDS_OF_PROGRAM

from . import tiny


ROOT = Path(__file__).parents[1]
PAGES = {page.stem: page for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md"))}
WITH_PYTHON = sorted(name for name, page in PAGES.items() if "```python" in page.read_text())
WITH_PYTHON.remove("vllm")  # tests/unsloth_ext/hrpo/vllm/test_page.py runs it where vLLM is


def check_imports(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                assert hasattr(importlib.import_module(node.module), alias.name), f"{node.module}.{alias.name}"


def run_examples(page: Path) -> None:
    for example in Document.parse(str(page), PythonCodeBlockParser(), SkipParser()).examples():
        try:
            example.evaluate()
        except SkipTest:
            check_imports(example.parsed)


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_python(page, tmp_path, monkeypatch):
    """As in a fresh process: no page relies on patches that another one has applied."""
    monkeypatch.chdir(tmp_path)
    for name in patches.NAMES:
        patches.revert(name)
    run_examples(PAGES[page])


@pytest.mark.parametrize("name, there", [("HRPOTrainer", True), ("NoSuchTrainer", False)])
def test_what_a_skipped_example_imports_must_be_there(tmp_path, name, there):
    page = tmp_path / "page.md"
    code = f"from trl_ext import {name}\n\nassert False"
    page.write_text(f'<!-- skip: next "it needs a GPU" -->\n\n```python\n{code}\n```\n')
    with contextlib.nullcontext() if there else pytest.raises(AssertionError, match="NoSuchTrainer"):
        run_examples(page)


def commands() -> list[str]:
    """The shell commands of all pages, without comments."""
    found = []
    for page in PAGES.values():
        for region in CodeBlockParser("bash", evaluator=print)(Document(page.read_text(), str(page))):
            found += region.parsed.replace("\\\n", " ").splitlines()
    return sorted({" ".join(line.partition(" #")[0].split()) for line in found})


COMMANDS = commands()
MAKE = [line for line in COMMANDS if line.startswith("make ")]
INSTALL = [line for line in COMMANDS if line.startswith("pip install ")]
PROGRAM = [line for line in COMMANDS if "latent-reasoning " in line or " -m trl_ext " in line]
SCRIPTS = [line for line in COMMANDS if "recipes/" in line]
MODULES = [line for line in COMMANDS if line.startswith("python -m ") and line not in PROGRAM]
SERVE = [line for line in COMMANDS if "vllm serve " in line]  # looked at where vLLM is
MODELS = ("--model_name", "--init_from", "--teacher", "--student")  # flags before the name of a model or a folder


def make_models(flags: list[str]) -> None:
    for flag, value in pairwise(flags):
        if flag in MODELS and value not in ("tiny", "smollm2"):
            tiny.model().save_pretrained(value)
            tiny.tokenizer().save_pretrained(value)


@pytest.fixture
def check_flags(tmp_path, monkeypatch):
    """Run the recipe that a command names with `--check_flags`, which trains nothing.

    The models that the command names are small ones, in folders of the same names.
    """
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")

    def check(command: str) -> None:
        words = shlex.split(command)
        at = next(i for i, word in enumerate(words) if word.startswith("recipes/") and word.endswith(".py"))
        script, *flags = words[at:]
        make_models(flags)
        monkeypatch.setattr(sys, "argv", [script, *flags, "--check_flags"])
        with pytest.raises((SystemExit, ValueError)) as stopped:
            runpy.run_path(script, run_name="__main__")
        # A configuration for a GPU is refused on a CPU after its flags have been read
        assert not getattr(stopped.value, "code", 1) or "bf16=True: no GPU here" in str(stopped.value)

    return check


@pytest.mark.parametrize("command", SCRIPTS)
def test_flags_of_scripts(command, check_flags):
    check_flags(command)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make here")
@pytest.mark.parametrize("command", MAKE)
def test_targets_and_their_flags(command, check_flags):
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(
        [*shlex.split(command), "-n"], cwd=ROOT, env=outside, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    last = done.stdout.splitlines()[-1]
    if "recipes/" in last:
        check_flags(last)


@pytest.mark.parametrize("command", PROGRAM)
def test_our_program(command, tmp_path, monkeypatch):
    """Training is run until it has parsed its flags, any other command is parsed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.setitem(sys.modules, "__main__", sys.modules["__main__"])
    words = shlex.split(command.removeprefix('eval "$(').removesuffix(')"'))
    name, *flags = words[words.index("trl_ext" if "trl_ext" in words else "latent-reasoning") + 1 :]
    module = importlib.import_module(COMMANDS_OF_PROGRAM[name][0])
    if name != "train":
        module.parser().parse_args(flags)
        return
    make_models(flags)
    with pytest.raises((SystemExit, ValueError)) as stopped:
        module.main([*flags, "--check_flags"])
    said = str(stopped.value)
    assert not getattr(stopped.value, "code", 1) or "bf16=True: no GPU" in said or "hub cannot be reached" in said


def test_what_is_installed_is_this_package():
    assert {line.split()[-1] for line in INSTALL} == {metadata.metadata("latent-reasoning-trl")["Name"]}


@pytest.mark.parametrize("command", MODULES)
def test_modules_and_the_files_that_they_are_given_are_there(command):
    _, _, module, *arguments = shlex.split(command)
    assert importlib.util.find_spec(module) is not None
    assert all((ROOT / argument).exists() for argument in arguments if argument.startswith("tests/"))


def test_each_command_is_looked_at():
    assert len(MAKE) > 10 and len(SCRIPTS) > 5
    assert set(COMMANDS) == {*MAKE, *SCRIPTS, *PROGRAM, *INSTALL, *MODULES, *SERVE}
