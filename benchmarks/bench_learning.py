"""Held-out accuracy over seeds: warm start, plain GRPO, and HRPO in each mode, with the same budget.

    python -m benchmarks.bench_learning [--seeds 3] [--steps 60]

Each seed has its own problems, warm start and training. The settings are those of recipes/configs/hrpo_tiny.yaml; GRPO
trains the same LoRA at the same rate on the same prompts. Writes benchmarks/results/learning_<device>.json and the
table beside it.
"""

import gc
import statistics
import tempfile
import time
from pathlib import Path

import trl
import yaml
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import patches
from benchmarks import setups
from trl_ext import HRPOConfig, HRPOTrainer
from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.console import PlainConsole
from trl_ext.cli.user_errors import in_sentences
from trl_ext.hrpo.config import HRPOArguments
from trl_ext.tasks import arithmetic, warm_start
from trl_ext.tasks.evaluation import AccuracyCallback, evaluate
from trl_ext.tasks.reward import make_reward
from unsloth_ext.hrpo.fast_model import LINEAR_LAYERS


ROOT = Path(__file__).parents[1]
VARIANTS = {
    "GRPO": None,
    "HRPO projection, frozen": ("projection", "frozen"),
    "HRPO projection, rollout": ("projection", "rollout"),
    "HRPO projection, two_pass": ("projection", "two_pass"),
    "HRPO soft_embedding, frozen": ("soft_embedding", "frozen"),
    "HRPO soft_embedding, rollout": ("soft_embedding", "rollout"),
    "HRPO soft_embedding, two_pass": ("soft_embedding", "two_pass"),
}
SCRIPT_FIELDS = ("model_name", "dataset")  # fields of the recipe, not of the trainer
SAMPLES = 4


def settings(steps: int, seed: int, variant: tuple[str, str] | None) -> dict:
    """The recipe's configuration with this run's seed and variant."""
    found = yaml.safe_load((ROOT / "recipes/configs/hrpo_tiny.yaml").read_text())
    ours = HRPOArguments.__dataclass_fields__ if variant is None else ()
    found = {k: v for k, v in found.items() if k not in SCRIPT_FIELDS and k not in ours}
    found |= {"output_dir": tempfile.mkdtemp(), "max_steps": steps, "seed": seed, "save_strategy": "no"}
    found |= {"disable_tqdm": True, "logging_steps": 5}
    return found if variant is None else found | {"thinking_source": variant[0], "recompute": variant[1]}


def run(variant: tuple[str, str] | None, seed: int, steps: int, base: str, train, held_out) -> dict:
    """Train one run from the warm start `base`, and evaluate it."""
    set_seed(seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    config = (trl.GRPOConfig if variant is None else HRPOConfig)(**settings(steps, seed, variant))
    decoding = {"max_new_tokens": config.max_completion_length, "batch_size": 400}
    accuracy = AccuracyCallback(10, lambda model: evaluate(model, tokenizer, held_out, **decoding))
    trainer = (trl.GRPOTrainer if variant is None else HRPOTrainer)(
        model,
        make_reward("####"),
        config,
        train_dataset=train,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules=list(LINEAR_LAYERS), task_type="CAUSAL_LM"),
        callbacks=[accuracy],
    )
    start = time.time()
    trainer.train()
    seconds = time.time() - start
    greedy = evaluate(trainer.model, tokenizer, held_out, **decoding)
    rewards = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    return {
        "greedy_at_start": accuracy.before.accuracy,
        "greedy": greedy.accuracy,
        "sampled": sampled_accuracy(trainer.model, tokenizer, held_out, decoding),
        "mean_length": greedy.mean_length,
        "thinking_share": greedy.thinking_share,
        "reward_last": statistics.mean(rewards[-3:]),
        "curve": [*accuracy.curve, (steps, greedy.accuracy)],
        "seconds": round(seconds, 1),
    }


def sampled_accuracy(model, tokenizer, held_out, decoding: dict) -> float:
    set_seed(0)
    return statistics.mean(
        evaluate(model, tokenizer, held_out, do_sample=True, **decoding).accuracy for _ in range(SAMPLES)
    )


def table(results: dict) -> str:
    """A Markdown table: mean and range over the seeds."""
    lines = ["| | greedy accuracy | sampled accuracy | smallest gain | s per run |", "|---|---|---|---|---|"]
    for name, runs in results.items():
        cell = lambda key, r=runs: (  # noqa: E731
            f"{statistics.mean(x[key] for x in r):.1%} ({min(x[key] for x in r):.1%} to {max(x[key] for x in r):.1%})"
        )
        gains = [x["greedy"] - w["greedy"] for x, w in zip(runs, results["warm start"], strict=True)]
        gain = "" if name == "warm start" else f"{min(gains) * 100:+.1f} points"
        lines.append(
            f"| {name} | {cell('greedy')} | {cell('sampled')} | {gain} | "
            f"{statistics.mean(x['seconds'] for x in runs):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = CommandLine(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--held_out", type=int, default=400)
    parser.add_argument("--cache", default="runs/cache")
    options = parser.parse_args()
    patches.apply("fused_lm_head")
    results: dict[str, list[dict]] = {name: [] for name in ("warm start", *VARIANTS)}
    for seed in range(options.seeds):
        start = time.time()
        base = warm_start.tiny_warm_start(
            Path(options.cache), seed=seed, held_out=options.held_out, steps=1500, delimiter="####", progress=False
        )
        seconds = round(time.time() - start, 1)
        train, held_out = map(arithmetic.as_dataset, arithmetic.split_problems(options.held_out, seed))
        model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
        decoding = {"max_new_tokens": 36, "batch_size": 400}
        results["warm start"].append(
            {
                "greedy": evaluate(model, tokenizer, held_out, **decoding).accuracy,
                "sampled": sampled_accuracy(model, tokenizer, held_out, decoding),
                "seconds": seconds,
            }
        )
        for name, variant in VARIANTS.items():
            results[name].append(run(variant, seed, options.steps, base, train, held_out))
            last = results[name][-1]
            print(f"seed {seed}  {name}: greedy {last['greedy']:.3f} sampled {last['sampled']:.3f}", flush=True)
            gc.collect()
    PlainConsole().print(table(results))
    note = f"{options.seeds} seeds, {options.steps} steps of 48 x 8 completions, {options.held_out} held-out problems"
    path = setups.write("learning", {"command": "make bench-learning", "setting": note, "results": results})
    setups.write_table(path, page)
    print(path)


def page(found: dict) -> str:
    """The table of benchmarks/results/learning_<device>.md."""
    return f"""# HRPO and GRPO over seeds

{found["setting"]}. Each seed has its own problems, warm start and training; every variant has the same budget.

{table(found["results"])}"""


TABLES = {"learning": page}


if __name__ == "__main__":
    in_sentences()
    main()
