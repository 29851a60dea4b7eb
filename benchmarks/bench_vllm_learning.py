"""HRPO over seeds on the embedded task, with rollouts in vLLM and with those of `generate`.

    make bench-vllm-learning [ARGS="--seeds 0 1 2"]  # the `.venv-vllm` of the tests; with a GPU, .venv with vLLM

It runs recipes/hrpo_gsm8k.py with the settings of recipes/configs/hrpo_tiny.yaml. Attention of vLLM on a CPU needs other
heads than the recipe's tiny model has, so the warm start has three heads of 32 instead of four of 24. Results are kept
in benchmarks/results/vllm_learning_<device>.json: finished runs are not repeated without --fresh.
"""

import json
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from accelerate.utils.other import get_free_port

from benchmarks import setups
from benchmarks.over_seeds import ROOT, arguments, in_order, run_recipe, seeds_of, table
from trl_ext.cli.console import PlainConsole
from trl_ext.cli.user_errors import in_sentences
from trl_ext.common.fingerprint import digest
from trl_ext.tasks import warm_start


STEPS, HELD_OUT = 60, 400
ENGINE = ["--use_vllm", "--vllm_enable_sleep_mode", "false", "--vllm_max_model_length", "128"]
RUNS = {"rollouts in vLLM": ENGINE, "rollouts from generate": ["--use_vllm", "false"]}
COLUMNS = (
    ("before", "before", ".1%"),
    ("after", "after", ".1%"),
    ("ratio_deviation", "largest deviation of the ratio", ".1e"),
)


def run(name: str, seed: int, steps: int, base: str) -> dict:
    """Run the recipe once, and read what it found."""
    with tempfile.TemporaryDirectory() as output:
        given = {
            "config": ROOT / "recipes/configs/hrpo_tiny.yaml",
            "model_name": base,
            "eval_size": HELD_OUT,
            "eval_every": 0,
            "seed": seed,
            "warm_start_seed": seed,
            "max_steps": steps,
            "save_steps": steps,
            "output_dir": output,
            "disable_tqdm": "true",
        }
        flags = [part for key, value in given.items() for part in (f"--{key}", str(value))]
        flags += RUNS[name]
        run_recipe(f"{name}, seed {seed}", "recipes/hrpo_gsm8k.py", flags, MASTER_PORT=str(get_free_port()))
        summary = json.loads(Path(output, "summary.json").read_text())
        state = json.loads(Path(output, f"checkpoint-{steps}", "trainer_state.json").read_text())
    deviations = [entry["thinking/ratio_deviation"] for entry in state["log_history"] if "reward" in entry]
    assert len(deviations) == steps
    return {
        "before": summary["before"]["accuracy"],
        "after": summary["after"]["accuracy"],
        "ratio_deviation": max(deviations),
    }


def main() -> None:
    options = arguments(__doc__, list(RUNS), STEPS, [0, 1, 2]).parse_args()
    made_with = {"steps": options.steps, "runs": digest(RUNS)}
    path, results = setups.so_far("vllm_learning", options.fresh, made_with)
    jobs = [(n, s) for s in options.seeds for n in options.only if str(s) not in results.get(n, {})]
    bases = {
        seed: warm_start.tiny_warm_start(
            ROOT / "runs/cache",
            seed=seed,
            held_out=HELD_OUT,
            steps=1500,
            delimiter="####",
            progress=False,
            heads=3,
        )
        for seed in sorted({seed for _, seed in jobs})
    }
    with ThreadPoolExecutor(1 if setups.CUDA else 2) as pool:
        running = {pool.submit(run, n, s, options.steps, bases[s]): (n, s) for n, s in jobs}
        for done in as_completed(running):
            n, seed = running[done]
            results.setdefault(n, {})[str(seed)] = done.result()
            print(f"seed {seed}  {table({n: {seed: done.result()}}, COLUMNS).splitlines()[-1]}", flush=True)
            about = {"command": "make bench-vllm-learning", "steps": options.steps, "made_with": made_with}
            setups.write("vllm_learning", {**about, "results": results})
    PlainConsole().print(table(in_order(results, RUNS), COLUMNS))
    setups.write_table(path, page)
    print(path)


def page(found: dict) -> str:
    """The table of benchmarks/results/vllm_learning_<device>.md."""
    results = in_order(found["results"], RUNS)
    return f"""# HRPO with rollouts in vLLM, over seeds

{seeds_of(results)} seeds, {found["steps"]} steps of 48 x 8 completions, greedy accuracy on {HELD_OUT} held-out sums
before and after training; mean (lowest..highest). Each seed has its own problems, warm start and training. The last column
is the largest |importance ratio - 1| at a first inner step, over all steps: the engine's probability of a token against the
trainer's.

{table(results, COLUMNS)}"""


TABLES = {"vllm_learning": page}


if __name__ == "__main__":
    in_sentences()
    main()
