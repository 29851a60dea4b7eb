"""`patches/` is the only place that changes other packages' code: nothing else assigns to what it imports."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from tests.processes import fresh


ROOT = Path(__file__).parents[2]
OURS = {"patches", "unsloth_ext", "trl_ext", "recipes", "benchmarks", "tests"}
CHECKED = ("unsloth_ext", "trl_ext", "recipes", "benchmarks")
MUTATORS = {
    *("update", "pop", "popitem", "setdefault", "clear", "append", "extend", "insert", "remove", "add", "discard"),
    *("__setitem__", "__delitem__", "__setattr__", "__delattr__"),
}
GLOBALS = {"__globals__", "f_globals", "func_globals"}
# What these return belongs to another package: a module, or a class or function beneath ours
FINDERS = {"__import__", "import_module", "getmodule", "unwrap", "mro"}
# Calls that hand on what they are given, or its elements
HAND_ON = {"next", "iter", "zip", "enumerate", "nullcontext"}
# A package's public way to be configured
ALLOWED = {
    "sys.argv.remove('--traceback')": "a flag that is read before all others",
    "sys.argv[0]": "what messages begin with",
    "sys.argv": "a recipe that the command line runs sees its own flags",
    "sys.modules['__main__']": "a recipe that the command line runs is the main module",
    "sys.path.insert(0, str(Path(__file__).parents[1]))": "a script that is started by its path",
    "matplotlib.rcParams['text.parse_math']": "documented by matplotlib",
    "sys.excepthook": "Python's hook for errors that nobody catches",
    "os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')": "documented by tokenizers; a value that is set stays",
    "os.environ.setdefault('TQDM_DISABLE', '1')": "documented by tqdm; a value that is set stays",
    "MODELS_CONFIG_MAP[name]": "vLLM's registry: a key of our own, and nobody's entry is changed",
    "utils.dispatch_cpu_unquantized_gemm": "a benchmark, on vLLM's build for CPUs, which TRL cannot push weights to",
    "os.environ[SHOW_TRACEBACK]": "a variable of this project",
    "os.environ.update({key: str(value) for key, value in environment.items()})": "`env:` in a user's own config file",
}


class Assignments(ast.NodeVisitor):
    """Finds assignments to attributes and items of what a file imports from other packages.

    What is followed: names that are imported, their attributes and items, `vars`, `getattr` and `sys.modules` of them, the
    class of any object (`type(x)`, `x.__class__`) and its parents, and names that any of these are assigned to, as an
    argument's default and in a comprehension too. The result of another call is an object of this project's own making. A
    name of the module that a function binds by `global`, an attribute of our own objects, and the arguments of a call are
    not followed: the test below that constructs trainers sees what these change.
    """

    def __init__(self):
        self.foreign: set[str] = set()
        self.modules: set[str] = set()
        self.finders: set[str] = set()  # other names for these
        self.found: list[tuple[int, str]] = []

    def is_foreign(self, node: ast.expr) -> bool:
        match node:
            case ast.Name():
                return node.id in self.foreign
            case ast.Attribute():
                return node.attr in {"__class__", *GLOBALS} or self.is_foreign(node.value)
            case ast.Subscript(slice=ast.Slice()):
                return False  # a copy
            case ast.Subscript() | ast.Starred() | ast.NamedExpr():
                return self.is_foreign(node.value)
            case ast.Tuple() | ast.List():
                return any(map(self.is_foreign, node.elts))
            case ast.Dict():
                return any(map(self.is_foreign, node.values))
            case ast.ListComp() | ast.SetComp() | ast.GeneratorExp():
                self.bind_generators(node)
                return not isinstance(node.elt, ast.List | ast.Dict) and self.is_foreign(node.elt)
            case ast.IfExp():
                return self.is_foreign(node.body) or self.is_foreign(node.orelse)
            case ast.BoolOp():
                return any(map(self.is_foreign, node.values))
            case ast.Call(func=ast.Name(id="type"), args=[_]):
                return True
            case ast.Call(func=ast.Name(id="vars" | "getattr"), args=[first, *_]):
                return self.is_foreign(first)
            case ast.Call():
                called = ast.unparse(node.func)
                name = called.split(".")[-1]
                if name in HAND_ON:
                    return any(map(self.is_foreign, node.args))
                return called.startswith("sys.modules.") or name in FINDERS | self.finders
        return False

    def report(self, node: ast.AST) -> None:
        self.found.append((node.lineno, ast.unparse(node)))

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            if alias.name.split(".")[0] not in OURS:
                name = alias.asname or alias.name.split(".")[0]
                self.foreign.add(name)
                self.modules.add(name)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        self.finders |= {alias.asname or alias.name for alias in node.names if alias.name in FINDERS}
        if not node.level and node.module.split(".")[0] not in OURS:
            self.foreign |= {alias.asname or alias.name for alias in node.names}

    def bind(self, target: ast.expr, value: ast.expr | None) -> None:
        """A store: an attribute or item of what is foreign is reported, a name for what is foreign is followed."""
        match target:
            case ast.Attribute() | ast.Subscript():
                if self.is_foreign(target.value):
                    self.report(target)
            case ast.Name() if value is not None and self.is_foreign(value):
                self.foreign.add(target.id)
            case ast.Starred():
                self.bind(target.value, value)
            case ast.Tuple() | ast.List():
                same = isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts)
                for each, its in zip(target.elts, value.elts if same else [value] * len(target.elts), strict=True):
                    self.bind(each, its)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.bind(target, node.value)
        self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.bind(node.target, node.value)
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.bind(node.target, None)
        if isinstance(node.target, ast.Name) and isinstance(node.op, ast.BitOr) and self.is_foreign(node.target):
            self.report(node)  # it changes a dictionary in place
        self.generic_visit(node)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.bind(node.target, node.value)
        self.generic_visit(node)

    def bind_elements(self, target: ast.expr, iterable: ast.expr) -> None:
        """A loop: its names stand for the elements."""
        match iterable:
            case ast.Call(func=ast.Name(id="list" | "tuple" | "sorted" | "set" | "reversed"), args=[one]):
                iterable = one
        match iterable:
            case ast.Call(func=ast.Attribute(value=owner, attr="values" | "items")):
                iterable = owner
        self.bind(target, iterable)

    def bind_generators(self, node: ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp) -> None:
        for loop in node.generators:
            self.bind_elements(loop.target, loop.iter)

    def visit_For(self, node: ast.For) -> None:
        self.bind_elements(node.target, node.iter)
        self.generic_visit(node)

    def visit_ListComp(self, node: Any) -> None:
        """The names of a comprehension are its own."""
        outside = set(self.foreign)
        self.bind_generators(node)
        self.generic_visit(node)
        self.foreign = outside

    visit_SetComp = visit_DictComp = visit_GeneratorExp = visit_ListComp

    def visit_With(self, node: ast.With) -> None:
        for item in node.items:
            if item.optional_vars is not None:
                self.bind(item.optional_vars, item.context_expr)
        self.generic_visit(node)

    def visit_Delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            self.bind(target, None)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        """A function's names are its own, and may be used above the line that binds them (in a loop)."""
        outside, arguments = self.foreign, node.args
        positional = [*arguments.posonlyargs, *arguments.args]
        own = {a.arg for a in (*positional, *arguments.kwonlyargs)}
        defaults = [*zip(reversed(positional), reversed(arguments.defaults))]
        defaults += zip(arguments.kwonlyargs, arguments.kw_defaults)
        given = {a.arg for a, default in defaults if default is not None and self.is_foreign(default)}
        self.foreign = outside - own | given
        found, before = list(self.found), None
        while before != self.foreign:
            before, self.found = set(self.foreign), list(found)
            self.generic_visit(node)
        self.foreign = outside

    visit_AsyncFunctionDef = visit_FunctionDef

    def visit_Call(self, node: ast.Call) -> None:
        called, first = ast.unparse(node.func), node.args[0] if node.args else None
        if called.split(".")[-1] in ("setattr", "delattr", "__setattr__", "__delattr__") and first is not None:
            if self.is_foreign(first):
                self.report(node)
        elif isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
            owner = node.func.value
            if self.is_foreign(owner) and not (isinstance(owner, ast.Name) and owner.id in self.modules):
                self.report(node)
        elif called.endswith(("patch", "patch.object", "patch.dict", "patch.multiple")) and first is not None:
            text = first.value if isinstance(first, ast.Constant) else None
            if self.is_foreign(first) or (isinstance(text, str) and text.split(".")[0] not in OURS):
                self.report(node)
        self.generic_visit(node)


def assignments(source: str) -> list[tuple[int, str]]:
    """(line, text) of each assignment in `source` to what belongs to another package."""
    finder = Assignments()
    for _ in range(2):  # a function may use a name that the module binds below it
        finder.found = []
        finder.visit(ast.parse(source))
    return finder.found


@pytest.mark.parametrize("folder", CHECKED)
def test_nothing_but_patches_assigns_to_another_package(folder):
    found = [
        f"{file.relative_to(ROOT)}:{line}: {text}"
        for file in sorted((ROOT / folder).rglob("*.py"))
        for line, text in assignments(file.read_text())
        if text not in ALLOWED
    ]
    assert not found, "make it a record in patches/ (docs/patches.md):\n" + "\n".join(found)


@pytest.mark.parametrize(
    "source",
    [
        "import trl\ntrl.GRPOTrainer.log = print",
        "import trl as t\nt.trainer.utils.selective_log_softmax = print",
        "from trl import GRPOTrainer\nGRPOTrainer.log = print",
        "from trl import GRPOTrainer\ndel GRPOTrainer.log",
        "from trl import GRPOTrainer as Parent\ndef f():\n    cls = Parent\n    cls.log = print",
        "from trl import GRPOTrainer\nGRPOTrainer.calls += 1",
        "from trl import GRPOTrainer\nbefore, GRPOTrainer.log = GRPOTrainer.log, print",
        "from trl import GRPOTrainer\nsetattr(GRPOTrainer, 'log', print)",
        "from trl import GRPOTrainer\nobject.__setattr__(GRPOTrainer, 'log', print)",
        "from trl import GRPOTrainer\nfor cls in (GRPOTrainer, int):\n    cls.log: object = print",
        "import sys\nsys.modules['trl.trainer.utils'].pad = print",
        "import sys\nm = sys.modules.get('unsloth.models._decode_graphs')\nm.ENABLED = False",
        "import sys\nfor module in list(sys.modules.values()):\n    module.pad = print",
        "import importlib\nimportlib.import_module('trl').pad = print",
        "def f(init):\n    names = init.__globals__\n    names.update(pad=print)",
        "def f(init):\n    init.__globals__['pad'] = print",
        "from trl.trainer import utils\nvars(utils)['pad'] = print",
        "from trl.trainer import utils\nutils.__dict__.update(pad=print)",
        "def f(model):\n    type(model).forward = print",
        "def f(model):\n    cls = model.__class__\n    cls.forward = print",
        "def f(model):\n    setattr(type(model), 'forward', print)",
        "from transformers.models.auto.modeling_auto import MODEL_MAPPING\nMODEL_MAPPING['x'] = print",
        "from transformers import ALL_ATTENTION_FUNCTIONS\nALL_ATTENTION_FUNCTIONS.update(x=print)",
        "import os\nos.environ['UNSLOTH_RETURN_HIDDEN_STATES'] = '1'",
        "import os\nos.environ.pop('UNSLOTH_RETURN_HIDDEN_STATES', None)",
        "from os import environ\nenviron.setdefault('UNSLOTH_X', '1')",
        "import torch\ntorch._dynamo.config.cache_size_limit = 1",
        "from unittest import mock\nimport trl\nwith mock.patch.object(trl.GRPOTrainer, 'log', print):\n    pass",
        "from unittest import mock\nwith mock.patch('trl.GRPOTrainer.log', print):\n    pass",
        "def f():\n    trl.pad = print\nimport trl",
        "import trl\ndef f(x, cls=trl.GRPOTrainer):\n    cls.log = print",
        "import trl\ndef f(*, cls=trl.GRPOTrainer):\n    cls.log = print",
        "import trl\n[setattr(module, 'pad', print) for module in (trl, trl.trainer)]",
        "import trl\nmodules = [module for module in (trl, trl.trainer)]\nmodules[0].pad = print",
        "import trl\nmodules = {'trl': trl}\nmodules['trl'].pad = print",
        "import trl\nfor module, name in zip([trl], ['pad']):\n    setattr(module, name, print)",
        "import contextlib, trl\nwith contextlib.nullcontext(trl) as module:\n    module.pad = print",
        "def f(model):\n    type(model).mro()[1].forward = print",
        "def f(model):\n    cls = next(c for c in type(model).__mro__ if 'forward' in vars(c))\n    cls.forward = print",
        "import inspect\ndef f(function):\n    inspect.getmodule(function).pad = print",
        "import inspect\ndef f(function):\n    inspect.unwrap(function).__code__ = print",
        "from importlib import import_module as load\nload('trl').pad = print",
        "__import__('trl').pad = print",
        "import trl\nnames = vars(trl)\nnames |= {'pad': print}",
    ],
)
def test_a_planted_assignment_is_found(source):
    assert assignments(source), source


@pytest.mark.parametrize(
    "source",
    [
        "from trl import GRPOTrainer\nclass Ours(GRPOTrainer):\n    def f(self):\n        self.log = print",
        "from transformers import AutoConfig\nconfig = AutoConfig.for_model('llama')\nconfig.use_cache = False",
        "import sys\nwords = list(sys.argv)\nwords[0] = 'x'\nmore = sys.argv[1:]\nmore[0] = 'y'",
        "from transformers import AttentionInterface\nAttentionInterface.register('x', print)",
        "import copy, torch\na = torch.zeros(2)\na[0] = 1\na.grad = None",
        "def f(trl):\n    trl.x = 1",
        "from patches import versions\nfrom .common import hub\nhub.x = versions.y = 1",
        "import os\nos.remove('x')\nvalue = os.environ.get('x')",
        "import sys\nlines = [[sys.executable, name] for name in ('a', 'b')]\nlines[0] += ['c']",
        "import trl\nnames = [name for name in trl.__all__]\nmade = {}\nmade[names[0]] = 1",
        "def f(rows, name=None):\n    for row, value in zip(rows, range(3)):\n        row[name] = value",
    ],
)
def test_what_is_ours_is_left_alone(source):
    assert not assignments(source), source


@pytest.mark.parametrize("planted", [False, True])
def test_constructing_trainers_changes_no_other_package(planted):
    """Compared in a fresh process: each module and class of trl, transformers, peft and accelerate, and the environment."""
    done = fresh("-m", "tests.patches.construct_trainers", *(["plant"] if planted else []))
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    if planted:
        assert found == {"planted": ["trl.trainer.grpo_trainer.GRPOTrainer.log"]}
    else:
        assert len(found) == 9 and not any(found.values()), found


def test_every_exception_is_needed():
    files = [file for folder in CHECKED for file in (ROOT / folder).rglob("*.py")]
    found = {text for file in files for _, text in assignments(file.read_text())}
    assert ALLOWED.keys() <= found
