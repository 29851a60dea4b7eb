"""`latent-reasoning compare A B`: two evaluations of the same questions, with a paired test.

A and B are `eval.json` files, or the folders that hold them. With one text for each question the test is McNemar's exact
one; with several, or with scores that are no 0 or 1, it permutes the two models within each question.
"""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from ..cli.command_line import CommandLine
from ..cli.console import PlainConsole
from ..common.run_folder import PROGRAM


DECODING = ("temperature", "max_new_tokens", "num_fewshot", "answer_delimiter", "seed")
FIELDS = {"task", "state", "n", "samples", "accuracy", "questions", "right"}  # of each result


def parser() -> CommandLine:
    """The parser of this command."""
    made = CommandLine(prog=f"{PROGRAM} compare", description=__doc__)
    made.add_argument("first", help="an eval.json, or its folder")
    made.add_argument("second", help="another one")
    made.add_argument("--state", help="compare these latent steps (default: on)")
    made.add_argument("--with_state", help="of the second (default: that of the first)")
    return made


def read_evaluation(name: str) -> dict[str, Any]:
    """The content of an `eval.json`.

    Raises:
        ValueError: there is none, or `latent-reasoning eval` has not written it.
    """
    file = Path(name, "eval.json") if Path(name).is_dir() else Path(name)
    if not file.is_file():
        raise ValueError(f"{file}: there is no such file; latent-reasoning eval writes it")
    try:
        found = json.loads(file.read_text())
    except ValueError:
        found = None
    results = found.get("results") if isinstance(found, dict) and "checkpoint" in found else None
    if not isinstance(results, list) or not all(isinstance(r, dict) and r.keys() >= FIELDS for r in results):
        raise ValueError(f"{file}: not written by latent-reasoning eval")
    return found | {"results": [*results, *map(comparable, found.get("harness", ()))]}


def comparable(row: dict[str, Any]) -> dict[str, Any]:
    """What lm-evaluation-harness found in the form of our results. `right` is None if a question has no single score."""
    return {
        "task": f"{row['task']} ({row['metric']}, {row['filter']})",
        "state": row["state"],
        "n": row["n"],
        "samples": 1,
        "accuracy": row["value"],
        "questions": row["questions"],
        "right": row["scores"],
    }


def result_in(found: dict[str, Any], task: str, state: str) -> dict[str, Any] | None:
    """The result of a task and a state; None if there is none."""
    return next((r for r in found["results"] if (r["task"], r["state"]) == (task, state)), None)


def paired(first: dict[str, Any], second: dict[str, Any]) -> tuple[float, float, float, float]:
    """Compare two results on the same questions.

    Args:
        first, second: results of `eval.json`.

    Returns:
        The difference of the accuracies, second minus first; its 95% percentile bootstrap interval over questions; and
        the two-sided p-value.

    Raises:
        ValueError: the questions differ, or the number of texts for each.
    """
    for name, what in (("n", "questions"), ("samples", "texts for each question"), ("questions", "questions")):
        if first[name] != second[name]:
            raise ValueError(
                f"{first['task']}: the two evaluations have other {what} ({first[name]} and {second[name]}); evaluate both "
                "with the same rows and flags"
            )
    from scipy import stats

    before, after = (np.asarray(r["right"], dtype=float) / r["samples"] for r in (first, second))
    gain = after - before
    rng = np.random.default_rng(0)
    drawn = gain[rng.integers(len(gain), size=(10_000, len(gain)))].mean(1)
    low, high = np.quantile(drawn, [0.025, 0.975])
    better, worse = int((gain > 0).sum()), int((gain < 0).sum())
    if not better + worse:
        p = 1.0
    elif first["samples"] == 1 and np.isin(gain, (-1, 0, 1)).all():
        p = stats.binomtest(better, better + worse, 0.5).pvalue
    else:
        p = stats.permutation_test(
            (before, after),
            lambda x, y, axis: np.mean(y - x, axis=axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=9999,
            rng=rng,
        ).pvalue
    return float(gain.mean()), float(low), float(high), float(p)


def main(argv: Sequence[str] | None = None) -> int:
    """Print a row for each task of both. Return 0."""
    flags = parser().parse_args(argv)
    if importlib.util.find_spec("scipy") is None:
        raise ImportError("the test needs SciPy: pip install 'latent-reasoning-trl[eval]'")
    first, second = read_evaluation(flags.first), read_evaluation(flags.second)
    state = flags.state or "on"
    other = flags.with_state or state
    table = Table(
        title=f"{first['checkpoint']} ({state}) against {second['checkpoint']} ({other})", title_justify="left"
    )
    for head in ("task", "n", "first", "second", "difference (95% interval)", "p"):
        table.add_column(head, justify="left" if head == "task" else "right", no_wrap=True)
    tasks = dict.fromkeys(r["task"] for found in (first, second) for r in found["results"] if r["right"] is not None)
    alone = []
    for task in tasks:
        one, two = result_in(first, task, state), result_in(second, task, other)
        if one and two:
            gain, low, high, p = paired(one, two)
            share = all(0 <= value <= 1 for value in (one["accuracy"], two["accuracy"]))
            form = ".1%" if share else ".4g"
            change = f"{gain:+{form}} ({low:+{form}} to {high:+{form}})"
            figures = [f"{one['accuracy']:{form}}", f"{two['accuracy']:{form}}"]
            table.add_row(task, str(one["n"]), *figures, change, f"{p:.3g}")
        else:
            alone.append(task)
    if not table.row_count:
        there = [sorted({(r["task"], r["state"]) for r in found["results"]}) for found in (first, second)]
        raise ValueError(f"no task is in both: {there[0]} with state {state}, and {there[1]} with state {other}")
    console = PlainConsole()
    console.print(table)
    whole = dict.fromkeys(r["task"] for found in (first, second) for r in found["results"] if r["right"] is None)
    if whole:
        console.print(f"No single score of each question: {', '.join(whole)}")
    if alone:
        console.print(f"Only in one of them, with these latent steps: {', '.join(alone)}")
    before, after = (found.get("flags", {}) for found in (first, second))
    other_flags = [name for name in DECODING if before.get(name) != after.get(name)]
    if other_flags:
        said = ", ".join(f"{name} {before.get(name)} and {after.get(name)}" for name in other_flags)
        console.print(f"The texts were decoded otherwise: {said}")
    return 0
