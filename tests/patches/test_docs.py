"""`docs/patches.md` lists what is there, and its example runs."""

import ast
import re
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import PreTrainedModel

import patches
from patches.table import table


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "patches.md").read_text()


@pytest.mark.parametrize("scoped", [True, False])
def test_the_tables_are_those_of_the_records(scoped):
    assert table(scoped) in PAGE, "run python -m patches.table"
    assert table(scoped).count("\n") == 2 + sum(patches.get(name).scoped is scoped for name in patches.NAMES)


def test_the_example_runs(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    before = patches.status()["completions_table"].applied
    patches.revert("completions_table")
    exec(compile(example, "docs/patches.md", "exec"), {})
    assert re.match(r"True \d+ [0-9a-f]{12} \(\)$", capsys.readouterr().out.strip())
    assert patches.status()["completions_table"].applied == 0
    if before:
        patches.apply("completions_table")


def replaced_methods(source: str) -> set[str]:
    """Methods of upstream's models that a file assigns on an object: `x.forward = ...`, by attribute, item or `setattr`."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=owner, attr=name, ctx=ast.Store()):
                own = isinstance(owner, ast.Name) and owner.id in ("self", "cls")
            case ast.Subscript(value=owner, slice=ast.Constant(value=str(name)), ctx=ast.Store()):
                own = not re.match(r"vars\(|.*__dict__$", ast.unparse(owner))
            case ast.Call(func=ast.Name(id="setattr"), args=[_, ast.Constant(value=str(name)), _]):
                own = False
            case _:
                continue
        if name.startswith("__") or name == "type":  # classes of our own; fields of dataclasses
            continue
        if not own and any(callable(getattr(cls, name, None)) for cls in (PreTrainedModel, PeftModel)):
            found.add(name)
    return found


def test_methods_that_are_replaced_on_one_object_are_listed():
    found = {
        ("/".join(file.relative_to(ROOT).parts[:2]), name)
        for folder in ("unsloth_ext", "trl_ext", "recipes")
        for file in (ROOT / folder).rglob("*.py")
        for name in replaced_methods(file.read_text())
    }
    assert found == set(re.findall(r"^\| `([\w/]+)` \| `(\w+)` of ", PAGE, re.MULTILINE))


@pytest.mark.parametrize(
    "source",
    ["model.forward = print", "vars(model)['forward'] = print", "m.__dict__['generate'] = 1", "setattr(m, 'eval', 1)"],
)
def test_a_planted_method_is_found(source):
    assert replaced_methods(source)
    assert not replaced_methods("self.forward = print\nmodel.settings = 1\nkwargs['forward'] = 1")
