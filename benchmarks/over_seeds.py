"""Run named variants over seeds, in two processes, and keep the results as they come."""

import argparse
import multiprocessing
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from benchmarks import setups
from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.console import PlainConsole
from trl_ext.common.fingerprint import digest


ROOT = Path(__file__).parents[1]
Columns = tuple[tuple[str, str, str], ...]  # key of a run, label, format


def compare(
    about: str,
    name: str,
    runs: dict[str, dict],
    run: Callable[[str, int, int], dict],
    steps: int,
    columns: Columns,
    held_out: str,
    page: Callable[[dict], str],
    prepare: Callable[[int], object] | None = None,
) -> None:
    """A command line that runs what is missing in benchmarks/results/<name>_<device>.json and writes the table beside
    it.

    Args:
        about: the script's docstring.
        name: name of the result files.
        runs: the settings of each run by name. Results with other settings are not mixed with these; new runs are added.
        run: returns the results of (name, seed, steps); a function of a module, so that processes can import it.
        steps: default number of steps.
        columns: columns of the table.
        held_out: number and kind of held-out rows, for the page.
        page: makes a Markdown page from the content of the JSON file.
        prepare: called with each seed before the runs, to make once what they share.
    """
    names = list(runs)
    options = arguments(about, names, steps, [0, 1, 2]).parse_args()
    made_with = {"steps": options.steps, "held_out": held_out}
    path, results = setups.so_far(name, options.fresh, made_with)
    settings = {n: digest(runs[n]) for n in names}
    changed = [n for n in names if any(found["made_with"] != settings[n] for found in results.get(n, {}).values())]
    if changed:
        raise ValueError(
            f"{path}: the settings of {', '.join(changed)} are other ones now: --fresh deletes all results"
        )
    workers = 1 if setups.CUDA else 2  # small models gain more from a second process than from a second thread
    jobs = [(n, s) for s in options.seeds for n in options.only if str(s) not in results.get(n, {})]
    for seed in sorted({s for _, s in jobs}) if prepare else ():
        prepare(seed)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(run, n, s, options.steps): (n, s) for n, s in jobs}
        for done in as_completed(running):
            n, seed = running[done]
            results.setdefault(n, {})[str(seed)] = done.result() | {"made_with": settings[n]}
            print(f"seed {seed}  {table({n: {seed: done.result()}}, columns).splitlines()[-1]}", flush=True)
            setups.write(name, {"command": f"make bench-{name}", "made_with": made_with, "results": results})
    PlainConsole().print(table(in_order(results, names), columns))
    setups.write_table(path, page)
    print(path)


def run_recipe(what: str, recipe: str, flags: list[str], **environment: str) -> None:
    """Run a recipe in a process of its own.

    Args:
        what: the name of the run, for an error.
        recipe: its path from the root of the project.
        flags: of its command line.
        **environment: further variables.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(
        [sys.executable, str(ROOT / recipe), *flags],
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", **environment},
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    if done.returncode:
        raise RuntimeError(f"{what}: {done.stderr[-2000:]}")


def in_order(results: dict[str, dict], names: Iterable[str]) -> dict[str, dict]:
    """Runs in the order of `names`, each with its seeds in order."""
    return {n: dict(sorted(results[n].items(), key=lambda pair: int(pair[0]))) for n in names if n in results}


def seeds_of(results: dict[str, dict]) -> str:
    """The number of seeds of the runs, such as "3", or "2 or 3" if some runs have more."""
    return " or ".join(map(str, sorted({len(runs) for runs in results.values()})))


def arguments(about: str, names: list[str], steps: int | None, seeds: list[int]) -> argparse.ArgumentParser:
    """The parser of a benchmark: seeds, optionally steps, a choice of runs, and whether to ignore earlier results."""
    parser = CommandLine(description=about.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=seeds)
    if steps is not None:
        parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--only", "--arms", nargs="*", default=names, choices=names)
    parser.add_argument("--fresh", action="store_true", help="delete all earlier results")
    return parser


def table(results: dict[str, dict], columns: Columns) -> str:
    """A Markdown table of runs by name and seed, without columns that no run has.

    These few lines need no library: tabulate is installed only as a dependency of others, and would not make them
    shorter.
    """
    every = [run for runs in results.values() for run in runs.values()]
    columns = tuple(column for column in columns if any(run.get(column[0]) is not None for run in every))
    lines = [f"| {' | '.join(['', *(label for _, label, _ in columns)])} |", "|---" + "|---:" * len(columns) + "|"]
    for name, runs in results.items():
        cells = [spread([run.get(key) for run in runs.values()], form) for key, _, form in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float | None], form: str) -> str:
    """The mean as text, with the lowest and the highest of several values."""
    if any(value is None for value in values):
        return ""
    mean = format(statistics.mean(values), form)
    return mean if min(values) == max(values) else f"{mean} ({min(values):{form}}..{max(values):{form}})"
