"""TRL's own GRPO tests with `trl.GRPOTrainer` rebound to HRPOTrainer: no failure that stock TRL does not have.

    python -m tests.drop_in.run_trl_tests PATH_TO_TRL_CHECKOUT [pytest arguments]

The tests are not in TRL's wheel: bring a checkout of the installed version's tag. They load models from a hub; folders
of the same names stand in for them, and what has no stand-in (vision models) fails on both sides alike.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from . import stand_ins


CONFTEST = """
import sys
sys.path.insert(0, {ours!r})
import patches
patches.apply("fused_lm_head")
if {rebind}:
    import trl, trl_ext
    trl.GRPOTrainer = trl_ext.HRPOTrainer
"""


def outcomes(checkout: Path, folder: Path, rebind: bool, extra: list[str]) -> dict[str, str]:
    """Test id -> PASSED, FAILED, ERROR or SKIPPED."""
    tests = folder / ("hrpo" if rebind else "stock") / "tests"
    shutil.copytree(checkout / "tests", tests)
    ours = str(Path(__file__).parents[2])
    conftest = tests / "conftest.py"
    conftest.write_text(CONFTEST.format(ours=ours, rebind=rebind) + conftest.read_text())
    for made in (folder / "stand-ins").iterdir():
        (tests.parent / made.name).symlink_to(made)
    call = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", "-c", "/dev/null", "--rootdir", "."]
    call += ["tests/test_grpo_trainer.py", *extra]
    done = subprocess.run(call, cwd=tests.parent, capture_output=True, text=True, check=False)
    (folder / f"{tests.parent.name}.log").write_text(done.stdout + done.stderr)
    found = re.findall(r"^(tests/\S+(?: \S+)*?) (PASSED|FAILED|ERROR|SKIPPED)", done.stdout, re.MULTILINE)
    return dict(found)


def main() -> int:
    checkout, extra = Path(sys.argv[1]), sys.argv[2:]
    folder = Path(tempfile.mkdtemp(prefix="trl-tests-"))
    stand_ins.make(folder / "stand-ins")
    stock = outcomes(checkout, folder, False, extra)
    ours = outcomes(checkout, folder, True, extra)
    count = lambda results, kind: sum(value == kind for value in results.values())  # noqa: E731
    for name, results in (("stock", stock), ("hrpo", ours)):
        print(f"{name}: {count(results, 'PASSED')} passed, {count(results, 'FAILED')} failed, {len(results)} in all")
    worse = sorted(test for test, result in stock.items() if result == "PASSED" and ours.get(test) != "PASSED")
    for test in worse:
        print(f"fails only with HRPOTrainer: {test}")
    print(f"logs: {folder}")
    return int(bool(worse) or not stock)


if __name__ == "__main__":
    sys.exit(main())
