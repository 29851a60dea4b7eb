"""TRL's own tests with its class rebound to one of ours: no failure that stock TRL does not have.

    python -m tests.drop_in.run_trl_tests PATH_TO_TRL_CHECKOUT [pytest arguments]

`HRPOTrainer` (thinking on) takes the place of `GRPOTrainer`, and each other trainer that can be turned off that of its
parent. The tests are not in TRL's wheel: bring a checkout. They load models from a hub; folders of the same names stand
in for them, and what has no stand-in (vision models) fails on both sides alike. `trl_tests.json` beside this file gets
the counts, which docs/dropin.md shows.
"""

import ast
import copy
import dataclasses
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from patches.versions import installed_version

from . import stand_ins


RESULTS = Path(__file__).with_name("trl_tests.json")
FILES = {"GRPOTrainer": "test_grpo_trainer.py", "SFTTrainer": "test_sft_trainer.py"}
CONFTEST = """
import sys
sys.path.insert(0, {ours!r})
import patches
patches.apply("fused_lm_head")
from tests.drop_in.run_trl_tests import fill_in
fill_in({file!r})
fill_in({file!r}.replace({file!r}.rpartition("/")[2], "testing_utils.py"))
if {name!r}:
    from tests.drop_in.run_trl_tests import rebind
    rebind({name!r})
"""


def fill_in(file: str) -> None:
    """Let a test file of another version import private names that the installed TRL lacks; what tests them then fails."""
    for node in ast.parse(Path(file).read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("trl."):
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name):
                    setattr(module, name.name, (lambda: False) if name.name.startswith("is_") else None)


def rebind(name: str) -> None:
    """Put a trainer of ours, turned off if it can be, in the place of its parent in TRL."""
    import trl

    import trl_ext

    if name == "HRPOTrainer":
        trl.GRPOTrainer = trl_ext.HRPOTrainer
        return
    from tests.drop_in.trainers import CASES

    case = next(case for case in CASES if case.name == name)
    ours, config = getattr(trl_ext, name), getattr(trl_ext, case.config)

    def turned_off(args: Any) -> Any:
        """The same settings in our configuration, which is not constructed again."""
        made = copy.copy(args)
        made.__class__ = config
        for field in dataclasses.fields(config):
            if not hasattr(made, field.name):
                default = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
                setattr(made, field.name, default)
        for field_name, value in (case.off or {}).items():
            setattr(made, field_name, value)
        return made

    kind = case.parent.removesuffix("Trainer")
    stock, signature = getattr(trl, f"{kind}Config"), inspect.signature(getattr(trl, case.parent))

    class Off(ours):  # type: ignore[misc, valid-type]
        def __init__(self, *args: Any, **kwargs: Any):
            given = signature.bind(*args, **kwargs).arguments
            given |= given.pop("kwargs", {})
            if given.get("args") is None:
                model = given["model"]
                given["args"] = stock(f"{getattr(model, 'name_or_path', model)}-{kind}".split("/")[-1])
            super().__init__(**given | {"args": turned_off(given["args"])})

    Off.__name__ = Off.__qualname__ = case.parent  # by another name it would be taken for Unsloth's
    setattr(trl, case.parent, Off)


def outcomes(checkout: Path, folder: Path, parent: str, name: str, extra: list[str]) -> dict[str, str]:
    """Test id -> PASSED, FAILED, ERROR or SKIPPED.

    Args:
        checkout: of TRL.
        folder: for copies and logs.
        parent: the class in TRL.
        name: ours in its place; empty: stock.
        extra: pytest arguments.
    """
    tests = folder / (name or f"stock-{parent}") / "trl_tests"  # `tests` is ours
    shutil.copytree(checkout / "tests", tests)
    ours = str(Path(__file__).parents[2])
    conftest = tests / "conftest.py"
    text = CONFTEST.format(ours=ours, name=name, file=str(tests / FILES[parent]))
    conftest.write_text(text + conftest.read_text())
    for made in (folder / "stand-ins").iterdir():
        (tests.parent / made.name).symlink_to(made)
    call = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "."]
    call += [f"{tests.name}/{FILES[parent]}", *extra]
    done = subprocess.run(
        call, cwd=tests.parent, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False
    )
    (folder / f"{tests.parent.name}.log").write_text(done.stdout + done.stderr)
    found = re.findall(r"^(trl_tests/\S+(?: \S+)*?) (PASSED|FAILED|ERROR|SKIPPED)", done.stdout, re.MULTILINE)
    return dict(found)


def main() -> int:
    """Run the tests, print what fails only with ours, and write the counts. Return 1 if there is such a test."""
    checkout, extra = Path(sys.argv[1]), sys.argv[2:]
    folder = Path(tempfile.mkdtemp(prefix="trl-tests-"))
    stand_ins.make(folder / "stand-ins")
    count = lambda results, kind: sum(value == kind for value in results.values())  # noqa: E731
    from .trainers import CASES

    written: dict[str, Any] = {
        "tests": (checkout / "VERSION").read_text().strip() if (checkout / "VERSION").is_file() else "unknown",
        "versions": {name: str(installed_version(name)) for name in ("trl", "transformers", "peft", "torch")},
        "classes": {},
    }
    bad = False
    for parent in FILES:
        stock = outcomes(checkout, folder, parent, "", extra)
        bad |= not stock
        for name in ["", *(case.name for case in CASES if case.parent == parent and case.off and not case.tags)]:
            found = outcomes(checkout, folder, parent, name, extra) if name else stock
            worse = sorted(t for t, result in stock.items() if result == "PASSED" and found.get(t) != "PASSED")
            better = sorted(t for t, result in found.items() if result == "PASSED" and stock.get(t) != "PASSED")
            counts = {kind.lower(): count(found, kind) for kind in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
            written["classes"][name or parent] = {"parent": parent, **counts, "only_ours": worse, "only_stock": better}
            print(f"{name or f'stock {parent}'}: {counts}", flush=True)
            for test in worse:
                print(f"  passes on stock only: {test}", flush=True)
            bad |= bool(worse)
    RESULTS.write_text(json.dumps(written, indent=1) + "\n")
    print(f"logs: {folder}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
