"""Changes single places of the method code and reports which changes no test notices.

    python tests/mutate.py                                    # 200 mutants, drawn with seed 0, of all method code
    python tests/mutate.py --number 50 --seed 7 trl_ext/hrpo  # of some files or folders
    make mutants ARGS="--number 50"

First the suite runs once and remembers which function each test calls (`--calls`, made anew with `--trace`). Each mutant is
then tried in a fork of one process that has imported everything: the function's code is swapped in memory, no file is
written, and only the tests that call it run, the quickest first. A mutant survives when all of them pass; one that fails
is asked again without the mutant.

Mutants that change nothing that a test should see stand in `tests/mutants_accepted.json`, each with its reason.
"""

import argparse
import ast
import concurrent.futures
import contextlib
import gc
import importlib
import io
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import types
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
ACCEPTED = Path(__file__).with_name("mutants_accepted.json")
METHOD_CODE = ("unsloth_ext", "trl_ext", "patches")
COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
ARITHMETIC = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div}
UNWRAPPED = ("detach", "clamp", "clamp_", "masked_fill", "abs", "float")  # calls that a mutant leaves out


@dataclass(frozen=True)
class Mutant:
    """One change: the `index`-th possible one of a file.

    Attributes:
        file: path from the root.
        function: qualified name.
        line: of the place.
        before, after: its source.
        around: the whole line's.
    """

    file: str
    index: int
    function: str
    line: int
    before: str
    after: str
    around: str

    def key(self) -> str:
        """What the list of accepted mutants knows it by."""
        return f"{self.file}::{self.function}: {self.around}: {self.before} -> {self.after}"


class Mutator(ast.NodeTransformer):
    """Walks over a module and counts the places; at the `wanted` one it makes the change."""

    def __init__(self, wanted: int = -1):
        self.wanted, self.count, self.scope = wanted, 0, []
        self.places: list[tuple[str, int, str, str]] = []

    def _place(self, node: ast.AST, changed: ast.AST) -> ast.AST:
        if not any(kind == "function" for kind, _ in self.scope):
            return node
        name = ".".join(name for _, name in self.scope)
        self.places.append((name, node.lineno, ast.unparse(node), ast.unparse(changed)))
        self.count += 1
        return ast.copy_location(changed, node) if self.count - 1 == self.wanted else node

    def _function(self, node):
        self.scope.append(("function", node.name))
        docstring = ast.get_docstring(node) is not None
        node.body = [
            statement if docstring and i == 0 else self.visit(statement) for i, statement in enumerate(node.body)
        ]
        self.scope.pop()
        return node  # neither its annotations nor its defaults: these are read when the module is imported

    visit_FunctionDef = visit_AsyncFunctionDef = _function

    def visit_ClassDef(self, node):
        self.scope.append(("class", node.name))
        self.generic_visit(node)
        self.scope.pop()
        return node

    def visit_Raise(self, node):
        return node  # what an error says

    visit_JoinedStr = visit_AnnAssign = visit_Assert = visit_Raise

    def visit_Call(self, node):
        self.generic_visit(node)
        if isinstance(node.func, ast.Attribute) and node.func.attr in UNWRAPPED:
            return self._place(node, node.func.value)
        return node

    def visit_Compare(self, node):
        self.generic_visit(node)
        if len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            other = COMPARISONS[type(node.ops[0])]()
            return self._place(node, ast.Compare(node.left, [other], node.comparators))
        return node

    def visit_BinOp(self, node):
        self.generic_visit(node)
        other = ARITHMETIC.get(type(node.op))
        return node if other is None else self._place(node, ast.BinOp(node.left, other(), node.right))

    def visit_BoolOp(self, node):
        self.generic_visit(node)
        other = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        return self._place(node, ast.BoolOp(other, node.values))

    def visit_UnaryOp(self, node):
        self.generic_visit(node)
        if isinstance(node.op, ast.Not | ast.USub | ast.Invert):
            return self._place(node, node.operand)
        return node

    def visit_Constant(self, node):
        value = node.value
        if isinstance(value, bool):
            return self._place(node, ast.Constant(not value))
        if isinstance(value, int):
            return self._place(node, ast.Constant(value + 1))
        if isinstance(value, float):
            return self._place(node, ast.Constant(value * 2 if value else 1.0))
        return node

    def visit_IfExp(self, node):
        self.generic_visit(node)
        return self._place(node, ast.IfExp(node.test, node.orelse, node.body))


def mutants_of(file: Path) -> list[Mutant]:
    """Every possible change of a file."""
    finder, lines = Mutator(), file.read_text().splitlines()
    finder.visit(ast.parse(file.read_text()))
    name = str(file.relative_to(ROOT))
    return [Mutant(name, i, *place, lines[place[1] - 1].strip()) for i, place in enumerate(finder.places)]


def swap(mutant: Mutant) -> None:
    """Make the change in the functions of this process that were compiled from the place."""
    path = str(ROOT / mutant.file)
    importlib.import_module(mutant.file.removesuffix(".py").replace("/", "."))
    tree = Mutator(mutant.index).visit(ast.parse(Path(path).read_text()))
    code = {
        (c.co_qualname, c.co_firstlineno): c for c in _codes(compile(ast.fix_missing_locations(tree), path, "exec"))
    }
    swapped = 0
    gc.unfreeze()  # what is frozen is not listed
    for function in gc.get_objects():
        if isinstance(function, types.FunctionType) and function.__code__.co_filename == path:
            new = code.get((function.__code__.co_qualname, function.__code__.co_firstlineno))
            if new is not None and new.co_freevars == function.__code__.co_freevars:
                function.__code__ = new
                swapped += 1
    if not swapped:
        raise RuntimeError(f"no function of {mutant.file} is in memory")


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _codes(constant)


class Calls:
    """A pytest plugin: which functions of the method code each test calls, and how long it took.

    Args:
        folder: where each process writes what it saw.
    """

    def __init__(self, folder: Path):
        self.folder, self.tests = folder, {}
        self._prefixes = tuple(str(ROOT / package) + os.sep for package in METHOD_CODE)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        seen: set[tuple[str, str]] = set()

        def watch(frame, event, _):
            name = frame.f_code.co_filename
            if name.startswith(self._prefixes):
                seen.add((name, frame.f_code.co_qualname))

        began = time.perf_counter()
        sys.settrace(watch)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            found = sorted(f"{os.path.relpath(file, ROOT)}::{name}" for file, name in seen)
            self.tests[item.nodeid] = {"seconds": time.perf_counter() - began, "calls": found}

    def pytest_sessionfinish(self):
        (self.folder / f"{os.getpid()}.json").write_text(json.dumps(self.tests))


def pytest_configure(config: pytest.Config) -> None:
    """What `-p tests.mutate` does, in each of pytest's processes."""
    config.pluginmanager.register(Calls(Path(os.environ["TRACED"])))


def trace(to: Path, workers: int) -> None:
    """Run the suite once and write down who calls what."""
    to.parent.mkdir(parents=True, exist_ok=True)
    suite = ["-q", "-n", str(workers), "--dist", "loadfile", "-p", "no:cacheprovider", "-p", "tests.mutate"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "pytest", *suite, "-m", "not slow and not unsloth"],
            cwd=ROOT,
            env=os.environ | {"TRACED": folder},
            check=False,
        )
        tests = [json.loads(file.read_text()) for file in Path(folder).iterdir()]
    to.write_text(json.dumps({name: found for part in tests for name, found in part.items()}))


class Collected:
    """A pytest plugin: which tests there are, and the first that fails."""

    def __init__(self):
        self.tests: set[str] = set()
        self.failed = ""

    def pytest_collection_finish(self, session):
        self.tests |= {item.nodeid for item in session.items}

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.failed:
            self.failed = report.nodeid


def first_failure(tests: list[str], limit: int, mutant: Mutant | None = None) -> str | None:
    """Of tests that run in a fork of this process, with a mutant or without; None: all pass, "": it hung or broke down."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, 1)
        os.dup2(nothing, 2)
        status, seen = 0, Collected()  # a mutant that cannot be made was noticed by none
        with contextlib.suppress(BaseException):  # whatever a mutant does here, the parent must hear a status
            if mutant is not None:
                swap(mutant)
            status = 1
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], [seen]) != 0)
        os.write(writing, seen.failed.encode())
        os._exit(status)
    os.close(writing)
    deadline, done, status = time.monotonic() + limit, 0, 1
    while not done and time.monotonic() < deadline:
        time.sleep(0.02)
        done, status = os.waitpid(child, os.WNOHANG)
    if not done:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        os.waitpid(child, 0)
    with os.fdopen(reading) as pipe:
        failed = pipe.read() if done else ""
    return failed if status or not done else None


KNOWN: dict[str, bool] = {}  # of tests that have failed with a mutant: whether they pass without


def attempt(job: tuple[Mutant, list[str], int]) -> tuple[Mutant, str]:
    """ "killed" or "survived". A test that fails without the mutant too says nothing of it."""
    mutant, tests, limit = job
    tests = [test for test in tests if KNOWN.get(test, True)]
    while tests:
        failed = first_failure(tests, limit, mutant)
        if failed is None:
            break
        if failed in tests and failed not in KNOWN:
            KNOWN[failed] = first_failure([failed], limit) is None
        if KNOWN.get(failed, True):
            return mutant, "killed"
        tests.remove(failed)
    return mutant, "survived"


def import_everything(tests: list[str]) -> set[str]:
    """Collect the tests, so that forks find them and what they import in memory.

    Returns:
        All that their files hold now; what is known of calls may be older.
    """
    import torch

    torch.set_num_threads(1)
    seen, files = Collected(), {test.partition("::")[0] for test in tests}
    with contextlib.redirect_stdout(io.StringIO()):
        there = sorted(file for file in files if Path(file).exists())
        pytest.main(["-q", "--collect-only", "-p", "no:cacheprovider", *there], [seen])
    gc.freeze()
    return seen.tests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", default=METHOD_CODE, help="files or folders of the method code")
    parser.add_argument("--number", type=int, default=200, help="how many mutants to try")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--tests", type=int, default=60, help="at most so many tests a mutant, the quickest first")
    parser.add_argument("--seconds", type=int, default=180, help="a mutant that runs longer has hung: it is killed")
    parser.add_argument("--workers", type=int, default=1, help="processes at once")
    parser.add_argument("--calls", type=Path, default=ROOT / "runs" / "mutate" / "calls.json")
    parser.add_argument("--trace", action="store_true", help="run the suite to find out who calls what, even if known")
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.trace or not args.calls.exists():
        trace(args.calls, args.workers)
    callers = defaultdict(list)
    for test, found in json.loads(args.calls.read_text()).items():
        for name in found["calls"]:
            callers[name.replace(".<locals>", "")].append((found["seconds"], test))

    files = [f for path in args.paths for f in ([ROOT / path] if path.endswith(".py") else (ROOT / path).rglob("*.py"))]
    accepted = json.loads(ACCEPTED.read_text()) if ACCEPTED.exists() else {}
    found = [m for file in sorted(files) for m in mutants_of(file) if m.key() not in accepted]
    random.Random(args.seed).shuffle(found)
    drawn = {m: [t for _, t in sorted(callers[f"{m.file}::{m.function}"])] for m in found[: args.number]}
    there = import_everything([test for tests in drawn.values() for test in tests])
    jobs, untested = [], []
    for mutant, tests in drawn.items():
        tests = [test for test in tests if test in there][: args.tests]
        (jobs if tests else untested).append((mutant, tests, args.seconds))
    survivors = [mutant for mutant, *_ in untested]
    if jobs and first_failure(jobs[0][1][:1], args.seconds) == "":
        raise SystemExit("pytest breaks down without a mutant: what would be said of mutants means nothing")
    with concurrent.futures.ProcessPoolExecutor(args.workers, multiprocessing.get_context("fork")) as pool:
        for i, (mutant, outcome) in enumerate(pool.map(attempt, jobs), start=1):
            if outcome == "survived":
                survivors.append(mutant)
            print(f"{i}/{len(jobs)} {outcome}: {mutant.key()}", flush=True)
    print(
        f"{len(jobs) + len(untested)} mutants, {len(survivors)} survived ({len(untested)} in code that no test calls):"
    )
    for mutant in survivors:
        print(f"  {mutant.file}:{mutant.line} in {mutant.function}: {mutant.before} -> {mutant.after}")


if __name__ == "__main__":
    main()
