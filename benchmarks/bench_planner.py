"""What a plan is worth, over seeds: soft planning, hard-EM, the switches of v3.1 one by one, and what each costs.

    make bench-concept                                            # with the other parts
    python -m benchmarks.bench_planner --seeds 0 --only soft multi_token

The facts of recipes/planner_executor.py: a tiny model from random weights writes a fact that it never saw from a plan of
four concepts. Held out; results so far are kept in benchmarks/results/planner_<device>.json: a run that is there is not
repeated without --fresh.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from rich.console import Console

from benchmarks import setups
from benchmarks.bench_concept import table


ROOT = Path(__file__).parents[1]
STEPS = 1500
HELD_OUT = 192
TYPES = [{"name": "first", "num_concepts": 32, "quota": 2}, {"name": "second", "num_concepts": 32, "quota": 2}]
# Soft planning, each of its parts left out, the switches one by one, and hard-EM, alone and from soft planning's middle
RUNS: dict[str, dict] = {
    "soft": {},
    "soft - quota": {"target_length": None},
    "soft - usage": {"usage_weight": 0.0},
    "soft - commitment": {"commitment_weight": 0.0},
    "all concepts of a type at once": {"multi_token": True},
    "types in parallel": {"ordering": "parallel"},
    "both": {"multi_token": True, "ordering": "parallel"},
    "length curriculum 2, 4": {"length_curriculum": [2, 4]},
    "hard-EM from scratch": {"training": "hard_em"},
    "soft, then hard-EM": {"training": "hard_em"},
    "soft, then hard-EM, M by staleness": {"training": "hard_em", "adaptive_e_step": True},
}


def run(name: str, seed: int, steps: int) -> dict:
    """One run; figures of the evaluation."""
    torch.set_num_threads(1)
    from transformers import AutoModelForCausalLM, set_seed

    from trl_ext import PlannerExecutorConfig, PlannerExecutorTrainer
    from trl_ext.planner.evaluation import evaluate_plans
    from trl_ext.tasks import facts

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere), contextlib.redirect_stdout(nowhere):
        tokenizer = facts.tokenizer()
        set_seed(seed)
        model = AutoModelForCausalLM.from_config(facts.config(tokenizer, facts.Size(layers=2, width=64)))
        train, held_out = facts.sentences(HELD_OUT, 0, 1)
        settings = {
                "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": 64, "seed": seed,
                "learning_rate": 2e-3, "lr_scheduler_type": "cosine", "warmup_steps": 20, "adam_beta2": 0.98,
                "types": TYPES, "mode": "reconstruct", "target_length": [2, 2], "max_length": None,
                "use_cpu": not setups.CUDA, "bf16": False, "report_to": "none", "save_strategy": "no",
                "disable_tqdm": True, "logging_steps": 50,
        }  # fmt: skip
        half = steps // 2 if name.startswith("soft, then") else 0
        seconds = 0.0
        for phase, number in (({}, half), (RUNS[name], steps - half)):
            if number:
                args = PlannerExecutorConfig(**{**settings, **phase, "max_steps": number})
                trainer = PlannerExecutorTrainer(model, args, train_dataset=train, processing_class=tokenizer)
                started = time.time()
                trainer.train()
                seconds += time.time() - started
        found = evaluate_plans(
            trainer.model, tokenizer, held_out, mode="reconstruct", max_new_tokens=6, batch_size=HELD_OUT, show=3
        )
    numbers = found.numbers()
    return {
        **numbers,
        "delta_null": numbers["nll_null"] - numbers["nll"],
        "delta_shuffled": numbers["nll_shuffled"] - numbers["nll"],
        "delta_random": numbers["nll_random"] - numbers["nll"],
        "concepts": sum(numbers["lengths"].values()),
        "mean_perplexity": sum(numbers["perplexity"].values()) / len(TYPES),
        "ms_per_step": 1000 * seconds / steps,
        "samples": found.samples,
    }


COLUMNS = (
    ("accuracy", "written right", ".0%"),
    ("token_accuracy", "tokens", ".0%"),
    ("nll", "NLL", ".2f"),
    ("delta_null", "dNLL null", ".2f"),
    ("delta_shuffled", "shuffled", ".2f"),
    ("delta_random", "random", ".2f"),
    ("concepts", "concepts", ".1f"),
    ("bits", "bits", ".0f"),
    ("told", "told", ".1f"),
    ("mean_perplexity", "perplexity", ".1f"),
    ("distinct", "distinct", ".0%"),
    ("plan_ms", "ms to plan", ".2f"),
    ("write_ms", "ms to write", ".2f"),
    ("ms_per_step", "ms/step", ".0f"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    from trl_ext.report import write_between

    path = setups.RESULTS / f"planner_{setups.device_name()}.json"
    if options.fresh:
        path.unlink(missing_ok=True)
    results = json.loads(path.read_text())["results"] if path.exists() else {}
    workers = 1 if setups.CUDA else 2  # such small models gain more from a second process than from a second thread
    jobs = [(n, s) for s in options.seeds for n in options.only if str(s) not in results.get(n, {})]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = {pool.submit(run, n, s, options.steps): (n, s) for n, s in jobs}
        for done in as_completed(running):
            name, seed = running[done]
            last = done.result()
            results.setdefault(name, {})[str(seed)] = last
            print(f"seed {seed}  {name}: {last['accuracy']:.3f}, dNLL null {last['delta_null']:.3f}", flush=True)
            setups.write("planner", {"command": "make bench-concept", "results": results})
    done = {n: dict(sorted(results[n].items(), key=lambda pair: int(pair[0]))) for n in RUNS if n in results}
    markdown = table(done, COLUMNS)
    Console().print(markdown, markup=False, soft_wrap=True)
    if path.name == "planner_cpu.json":
        seeds = min(len(runs) for runs in done.values())
        note = f"{seeds} seeds, {HELD_OUT} held-out facts, {options.steps} steps; mean (lowest..highest)."
        write_between(ROOT / "docs/concept_tokens.md", "planner", f"{note}\n\n{markdown}")
    print(path)


if __name__ == "__main__":
    main()
