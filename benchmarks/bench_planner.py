"""Planner and executor over seeds: soft planning, hard EM, each switch of v3.1, and their cost.

    make bench-planner                                            # with what the monitors cost
    python -m benchmarks.bench_planner --seeds 0 --only soft multi_token

The task is that of recipes/planner_executor.py: a tiny model, trained from random weights, writes an unseen fact from
a plan of four concepts. Metrics are on held-out rows. Results are kept in benchmarks/results/planner_<device>.json:
finished runs are not repeated without --fresh.
"""

import contextlib
import os
import tempfile
import time

import torch

from benchmarks import setups
from benchmarks.over_seeds import compare, in_order, seeds_of, table
from trl_ext.cli.user_errors import in_sentences


STEPS = 1500
HELD_OUT = 192
TYPES = [{"name": "first", "num_concepts": 32, "quota": 2}, {"name": "second", "num_concepts": 32, "quota": 2}]
FOUR = [{"name": name, "num_concepts": 32, "quota": 1} for name in ("first", "second", "third", "fourth")]
# Soft planning, without each of its parts, with each switch, and hard EM, alone or after half of the steps of soft planning
RUNS: dict[str, dict] = {
    "soft": {},
    "soft - quota": {"target_length": None},
    "soft - usage": {"usage_weight": 0.0},
    "soft + signal": {"signal_weight": 0.5},
    "soft + commitment": {"commitment_weight": 0.1},
    "soft, use averaged over 10 steps": {"usage_window": 40.0},
    "four types of one concept": {"types": FOUR, "target_length": None},
    "all concepts of a type at once": {"multi_token": True},
    "types in parallel": {"ordering": "parallel"},
    "both": {"multi_token": True, "ordering": "parallel"},
    "length curriculum 2, 4": {"length_curriculum": [2, 4]},
    "hard-EM from scratch": {"training": "hard_em"},
    "soft, then hard-EM": {"training": "hard_em"},
    "soft, then hard-EM, M by staleness": {"training": "hard_em", "adaptive_e_step": True},
    "both, then hard-EM": {"training": "hard_em", "multi_token": True, "ordering": "parallel"},
}


def run(name: str, seed: int, steps: int) -> dict:
    """Train and evaluate one run."""
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
            "output_dir": tempfile.mkdtemp(),
            "per_device_train_batch_size": 64,
            "seed": seed,
            "learning_rate": 2e-3,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 20,
            "adam_beta2": 0.98,
            "types": TYPES,
            "mode": "reconstruct",
            "target_length": [2, 2],
            "max_length": None,
            "use_cpu": not setups.CUDA,
            "bf16": False,
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
            "logging_steps": 50,
        }
        half = steps // 2 if ", then" in name else 0
        soft = {k: v for k, v in RUNS[name].items() if k in ("multi_token", "ordering")}
        seconds = 0.0
        for phase, number in ((soft, half), (RUNS[name], steps - half)):
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
        "mean_perplexity": sum(numbers["perplexity"].values()) / len(numbers["perplexity"]),
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
    ("explained_bits", "bits explained", ".1f"),
    ("mean_perplexity", "perplexity", ".1f"),
    ("distinct", "distinct", ".0%"),
    ("plan_ms", "ms to plan", ".2f"),
    ("write_ms", "ms to write", ".2f"),
    ("ms_per_step", "ms/step", ".0f"),
)


def page(found: dict) -> str:
    """The table of benchmarks/results/planner_<device>.md."""
    results, made_with = in_order(found["results"], RUNS), found["made_with"]
    return f"""# Planner and executor over seeds

{seeds_of(results)} seeds, {made_with["held_out"]}, {made_with["steps"]} steps; mean (lowest..highest).

- written right: held-out facts that are written exactly from their plans; tokens: tokens predicted right.
- NLL: nats per token under the text's own plan. dNLL: how much more without a plan (null), under another text's plan
  (shuffled), and under a random plan.
- concepts, bits: length of a plan, and the most that it could tell. Bits explained: what it does tell.
- perplexity: of the codewords; distinct: share of different plans among the texts.

{table(results, COLUMNS)}"""


TABLES = {"planner": page}


if __name__ == "__main__":
    in_sentences()
    compare(__doc__, "planner", RUNS, run, STEPS, COLUMNS, f"{HELD_OUT} held-out facts", page)
