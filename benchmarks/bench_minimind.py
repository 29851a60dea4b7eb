"""MiniMind's stages over seeds, each against its control; reinforcement learning with equal numbers of generated
tokens.

    make bench-minimind                                            # about 20 minutes per seed on two cores
    python -m benchmarks.bench_minimind --seeds 0 --only grpo spo

It runs the recipes on the built-in data, with different data, weights and samples for each seed. Metrics are on
held-out rows. Results are kept in benchmarks/results/minimind_<device>.json: finished runs are not repeated without
--fresh, as long as the models that they start from are in runs/bench_minimind.
"""

import json
from pathlib import Path

import yaml

from benchmarks import setups
from benchmarks.over_seeds import ROOT, arguments, in_order, run_recipe, seeds_of, spread
from trl_ext.cli.console import PlainConsole
from trl_ext.cli.user_errors import in_sentences
from trl_ext.common.fingerprint import digest


TOKENS = 80_000  # tokens generated in all rollouts of a run
RECIPES = ROOT / "recipes" / "minimind"
FOLDER = ROOT / "runs" / "bench_minimind"
# Two passes over each rollout, because in the first pass CISPO's gradient equals GRPO's
RL = ["--max_generated_tokens", str(TOKENS), "--num_iterations", "2", "--max_steps", "1000", "--logging_steps", "1"]
# Name: recipe, flags. The order matters, because some runs start from the models of others
RUNS: dict[str, tuple[str, list[str]]] = {
    "tokenizer": ("tokenizer", []),
    "pretrain": ("pretrain", []),
    "sft": ("sft", []),
    "lora": ("lora", []),
    "dpo": ("dpo", []),
    "dpo, mean": ("dpo", ["--loss_type", "sigmoid_norm"]),
    "grpo": ("grpo", RL),
    "cispo": ("grpo", [*RL, "--loss_type", "cispo", "--epsilon_high", "5.0"]),
    "ppo": ("ppo", RL),
    "spo": ("spo", RL),
    "spo, prompts in order": ("spo", [*RL, "--shuffle_dataset", "false"]),
    "spo, one value for all": ("spo", [*RL, "--value_tracker", "global"]),
    "distill": ("distill", []),
    "distill, no teacher": ("distill", ["--alpha", "1"]),
    "reason": ("reason", []),
    "reason, tags weigh 1": ("reason", ["--tag_weight", "1"]),
}
KEEP = {"tokenizer", "pretrain", "sft", "grpo"}  # written to the folders that other runs start from


def run(name: str, seed: int) -> dict:
    """One run; returns its summary without the history."""
    recipe, flags = RUNS[name]
    folder = FOLDER / str(seed)
    config = yaml.safe_load((RECIPES / "configs" / f"{recipe}_tiny.yaml").read_text())
    moved = {k: v.replace("runs/minimind", str(folder)) for k, v in config.items() if "runs/minimind" in str(v)}
    moved["output_dir"] = str(folder / (recipe if name in KEEP else name.replace(", ", "_").replace(" ", "_")))
    moved["embedded_seed"] = str(seed)
    if recipe != "tokenizer":
        moved |= {"seed": str(seed), "disable_tqdm": "true"}
    given = [part for key, value in moved.items() for part in (f"--{key}", value)]
    run_recipe(f"{name}, seed {seed}", f"recipes/minimind/{recipe}.py", [*given, *flags, "--overwrite", "true"])
    summary = json.loads(Path(moved["output_dir"], "summary.json").read_text())
    return {key: value for key, value in summary.items() if key != "history"}


def table(results: dict[str, dict[str, dict]]) -> str:
    """A Markdown table with a row for each metric of each run: mean (lowest..highest) over seeds."""
    lines = ["| stage | held out | before | after | steps |", "|---|---|---:|---:|---:|"]
    for name in (n for n in RUNS if n in results):
        runs = list(results[name].values())
        for i, metric in enumerate(runs[0]["after"]):
            form = ".1%" if "accuracy" in metric else ".3g"
            sides = [spread([run[side][metric] for run in runs], form) for side in ("before", "after")]
            steps = "" if i else spread([run["steps"] for run in runs], ".0f")
            lines.append(f"| {'' if i else name} | {metric} | {' | '.join([*sides, steps])} |")
    return "\n".join(lines)


def main() -> None:
    options = arguments(__doc__, list(RUNS), None, [0, 1, 2]).parse_args()
    configs = {file.name: file.read_text() for file in sorted(RECIPES.glob("configs/*_tiny.yaml"))}
    made_with = {"generated_tokens": TOKENS, "runs": digest([RUNS, configs])}
    path, results = setups.so_far("minimind", options.fresh, made_with)
    for seed in options.seeds:
        for name in (n for n in RUNS if n in options.only and str(seed) not in results.get(n, {})):
            found = results.setdefault(name, {})[str(seed)] = run(name, seed)
            print(f"seed {seed}  {name}: {found['before']} -> {found['after']}", flush=True)
            about = {"command": "make bench-minimind", "generated_tokens": TOKENS, "made_with": made_with}
            setups.write("minimind", {**about, "results": results})
    PlainConsole().print(table(results))
    setups.write_table(path, page)
    print(path)


def page(found: dict) -> str:
    """The table of benchmarks/results/minimind_<device>.md."""
    results = in_order(found["results"], RUNS)
    return f"""# MiniMind's stages over seeds

{seeds_of(results)} seeds, 300 held-out rows, reinforcement learning at {found["generated_tokens"]:,} generated tokens; mean
(lowest..highest). Each stage is followed by its controls.

{table(results)}"""


TABLES = {"minimind": page}


if __name__ == "__main__":
    in_sentences()
    main()
