"""Every method against its control on a pretrained model, SmolLM2-135M, and word problems with steps, at an equal budget.

    make bench-real                                                    # on a CPU: the small budget, hours
    make bench-real ARGS="--minutes 50"                                # a piece of it; the next call goes on
    make bench-real ARGS="--dataset train.jsonl --eval_dataset test.jsonl"     # GSM8K's files, or any with steps

All runs of a seed begin with one model that was tuned on written steps. Each has the same number of steps and of rows in
a step. Runs are in order of value; benchmarks/real/ has a file for each family. They are checkpointed, so that an
interrupted one goes on where it was. Writes benchmarks/results/real_<device>.json after every run, and the table beside
it. Finished runs are not repeated.
"""

import argparse
import dataclasses
import hashlib
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import disable_progress_bars

import patches
from benchmarks import setups
from benchmarks.over_seeds import ROOT, arguments, in_order, seeds_of, table
from benchmarks.real.concept import CONCEPTS, conceptual
from benchmarks.real.kv_distill import DISTILLED, distilled
from benchmarks.real.latent import EXPLICIT, LATENT_RUNS, explicit, latent
from benchmarks.real.planner import PLANNED, planned
from benchmarks.real.reinforced import REINFORCED, reinforced
from benchmarks.real.task import BUDGETS, RATES, Budget, PausedError, Task
from trl_ext.cli.console import PlainConsole
from trl_ext.cli.user_errors import in_sentences
from trl_ext.common.fingerprint import digest
from trl_ext.latent.sources import load_rows
from trl_ext.tasks import word_problems
from trl_ext.tasks.data import without
from unsloth_ext.common.ablations import ABLATIONS


FAMILIES: tuple[tuple[dict[str, Any], Callable[[Task, str], dict[str, Any]]], ...] = (
    (EXPLICIT, explicit),
    (LATENT_RUNS, latent),
    (REINFORCED, reinforced),
    (DISTILLED, distilled),
    (CONCEPTS, conceptual),
    (PLANNED, planned),
)
RUNS = [
    *EXPLICIT,
    "PCCoT",
    "CODI",
    *list(REINFORCED)[:2],
    *list(LATENT_RUNS)[2:],
    *list(REINFORCED)[2:],
    *DISTILLED,
    *CONCEPTS,
    *PLANNED,
]


def work_of(name: str) -> Callable[[Task, str], dict[str, Any]]:
    """The function that does a run."""
    return next(work for runs, work in FAMILIES if name in runs)


def settings_of(name: str) -> dict[str, Any] | None:
    """What a run has of its own; None for plain SFT."""
    if name in LATENT_RUNS:
        return LATENT_RUNS[name][-1]
    return {**REINFORCED, **DISTILLED, **CONCEPTS, **PLANNED}.get(name)


COLUMNS = (
    ("accuracy", "accuracy", ".1%"),
    ("low", "from", ".1%"),
    ("high", "to", ".1%"),
    ("before", "before", ".1%"),
    ("steps", "steps written", ".1%"),
    *((name, name, ".1%") for name in ABLATIONS),
    ("random_accuracy", "random plan", ".1%"),
    ("forward_passes", "passes", ".1f"),
    ("nll", "NLL", ".3f"),
    ("nll_null", "NLL, no plan", ".3f"),
    ("nll_random", "NLL, random", ".3f"),
    ("nll_tail", "NLL after others", ".3f"),
    ("nll_tail_random", "the same, random", ".3f"),
    ("macs", "MACs", ".0%"),
    ("seconds", "s a run", ".0f"),
)


def rows_of(options: argparse.Namespace, budget: Budget, seed: int) -> tuple[list[dict], list[dict], int]:
    """Rows to train on, held-out rows, and how many steps latent tokens stand for."""
    size = 2 * max(budget.steps, budget.warm_up) * budget.rows
    if options.dataset is None:
        return *word_problems.split(size, budget.held_out, seed), 2 * word_problems.ANIMALS - 2
    held_out = load_rows(options.eval_dataset, size=budget.held_out, need_steps=False).usable
    return without(load_rows(options.dataset).usable, held_out), held_out, 6


def belongs_to(run: Path, settings: str) -> None:
    """Delete the checkpoints of a run that was begun with other settings."""
    mark = run / "settings"
    if not mark.exists() or mark.read_text() != settings:
        shutil.rmtree(run, ignore_errors=True)
    run.mkdir(parents=True, exist_ok=True)
    mark.write_text(settings)


def page(found: dict) -> str:
    """The table of benchmarks/results/real_<device>.md."""
    results, made_with = in_order(found["results"], RUNS), found["made_with"]
    budget = BUDGETS[made_with["budget"]]
    data = made_with["dataset"]
    task = f"{word_problems.ANIMALS} kinds of animals and their legs" if data == "legs" else data
    return f"""# Methods on SmolLM2-135M

Word problems ({task}), {budget.held_out} held out; {seeds_of(results)} seed(s). The budget is `{made_with["budget"]}`: a
common start of {budget.warm_up} steps on written steps, then for each run {budget.steps} steps of {budget.rows} rows, or
with rewards {budget.reinforced} steps of {2 * budget.rows} completions. All weights are trained, in bfloat16 with float32
master weights, but concept tokens and their controls train LoRA. The control of latent tokens and of the planner is SFT
with steps, that of HRPO is GRPO; the others have theirs below them.

- accuracy: greedy, as the method answers, with its 95% interval for one seed; "before": of the same model before its run;
  "steps written": of the same model when it writes the steps; zero, shuffle, noise, interpolate: with its latent tokens or
  thinking states replaced; "random plan": when it writes from a random plan.
- passes: forward passes for a question, with rewards tokens of a completion.
- NLL: nats per token of the held-out steps and answers; the planner's includes their ends. "No plan", "random": without a
  plan, and with random plans or concepts. "After others": of tokens that do not follow a concept, and the same with random
  concepts. If these two are equal, concepts tell other tokens nothing.
- MACs: multiplications, as a share of the model with all layers.

{table(results, COLUMNS)}"""


TABLES = {"real": page}


def main() -> None:
    parser = arguments(__doc__, RUNS, None, [0])
    parser.add_argument("--budget", choices=BUDGETS, default="full" if setups.CUDA else "small")
    parser.add_argument("--dataset", help="a file with steps; default: animals and their legs, made by code")
    parser.add_argument("--eval_dataset", help="a file with held-out problems, for --dataset")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="pause after so many minutes")
    options = parser.parse_args()
    if bool(options.dataset) != bool(options.eval_dataset):
        parser.error("--dataset and --eval_dataset go together")
    until = time.monotonic() + 60 * options.minutes
    disable_progress_bars()
    patches.apply("fused_lm_head")
    budget = BUDGETS[options.budget]
    rows = {seed: rows_of(options, budget, seed) for seed in options.seeds}
    data = "legs"
    if options.dataset:
        files = [Path(file) for file in (options.dataset, options.eval_dataset)]
        contents = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
        data = f"{files[0].name}, held out {files[1].name} ({digest(contents)})"
    made_with = {"budget": options.budget, "dataset": data, "common": digest([dataclasses.asdict(budget), RATES])}
    path, results = setups.so_far("real", options.fresh, made_with)
    for seed in options.seeds:
        folder = ROOT / f"runs/real/{digest([made_with, seed, setups.device_name()])[:12]}"
        if options.fresh:
            shutil.rmtree(folder, ignore_errors=True)
        task = Task(budget, *rows[seed], folder, seed, until)
        for name in options.only:
            settings = digest([settings_of(name), made_with])
            if results.get(name, {}).get(str(seed), {}).get("made_with") == settings:
                continue
            belongs_to(folder / name, settings)
            try:
                found = work_of(name)(task, name)
            except PausedError:
                print(f"seed {seed}  {name}: paused; the same command goes on")
                return
            shutil.rmtree(folder / name, ignore_errors=True)
            results = setups.so_far("real", False, made_with)[1]  # another process may have finished runs
            results.setdefault(name, {})[str(seed)] = found | {"made_with": settings}
            print(f"seed {seed}  {table({name: {seed: found}}, COLUMNS).splitlines()[-1]}", flush=True)
            setups.write("real", {"command": "make bench-real", "made_with": made_with, "results": results})
            setups.write_table(path, page)
    PlainConsole().print(table(in_order(results, RUNS), COLUMNS))
    print(path)


if __name__ == "__main__":
    in_sentences()
    main()
