"""Latent tokens over seeds: held-out accuracy of generated answers, after the same number of steps from one warm start.

It compares plain SFT with and without steps, pause tokens, CODI, PCCoT and KaVa without and with the LM head reading
their latent tokens, KaVa with each choice of keys, LOTUS, SIM-CoT and Coconut.

    python -m benchmarks.bench_latent [--seeds 0 1 2] [--steps N] [--size small|chains|large]

Settings are those of recipes/configs/*_tiny.yaml with the changes of `VARIANTS`; with a GPU the task and the model are
larger (`LARGE`); `chains` has five operations. Writes benchmarks/results/latent_<device>.json (latent_chains_<device>.json,
latent_large_<device>.json) after every run, and at the end the table beside it. Finished runs with the same settings are
not repeated without `--fresh`.
"""

import dataclasses
import gc
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

import patches
from benchmarks import setups
from benchmarks.over_seeds import in_order, seeds_of
from trl_ext import (
    CoconutConfig,
    CoconutTrainer,
    CODIConfig,
    CODITrainer,
    KAVAConfig,
    KAVATrainer,
    LOTUSConfig,
    LOTUSTrainer,
    PCCoTConfig,
    PCCoTTrainer,
)
from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.console import PlainConsole
from trl_ext.cli.user_errors import in_sentences
from trl_ext.common.fingerprint import digest
from trl_ext.latent.evaluation import bootstrap_interval, evaluate_answers
from trl_ext.latent.recipe import ScriptArguments
from trl_ext.tasks import equations, warm_start
from unsloth_ext.common.ablations import ABLATIONS


ALONE = 50  # questions answered one by one, to measure the time of a single question
TERMS = ("ce_student", "ce_teacher", "codi", "kv", "latent_ce", "step_decoder")
ROOT = Path(__file__).parents[1]
TRAINERS = {
    "codi": (CODITrainer, CODIConfig),
    "pccot": (PCCoTTrainer, PCCoTConfig),
    "kava": (KAVATrainer, KAVAConfig),
    "lotus": (LOTUSTrainer, LOTUSConfig),
    "coconut": (CoconutTrainer, CoconutConfig),
}
FEWER = 9  # fewer than the trace's 12 or more tokens, so that scorers choose; rkv needs more than its window of 8
SCORERS = ("kava", "rkv", "random", "uniform")
LONG = {"max_steps": 2500, "w_latent_ce": 0.0}
VARIANTS: dict[str, tuple[str, dict]] = {
    "SFT without steps": ("sft", {"steps": False}),
    "SFT with steps": ("sft", {"steps": True}),
    "pause tokens": ("pccot", {"iterations": 0, "w_teacher": 0.0, "w_codi": 0.0, **LONG}),
    "CODI": ("codi", LONG),
    "PCCoT": ("pccot", LONG),
    "KaVa": ("kava", LONG),
    **{f"KaVa, {FEWER} by {s}": ("kava", {"num_latents": FEWER, "kv_scorer": s, **LONG}) for s in SCORERS},
    "Coconut": ("coconut", {}),
    "CODI, SIM-CoT": ("codi", {"w_step_decoder": 1.0, **LONG}),
    "Coconut, SIM-CoT": ("coconut", {"w_step_decoder": 1.0}),
    "CODI, read": ("codi", {}),
    "PCCoT, read": ("pccot", {}),
    "KaVa, read": ("kava", {}),
    "LOTUS": ("lotus", {}),
}


# Changes for equations.LARGE. Its trace without the last step has 24 tokens, the published number of latent tokens
LARGE = {
    "codi": {"projection_dim": 256},
    "pccot": {"num_latents": 24},
    "kava": {"num_latents": 24, "projection_dim": 256},
    "lotus": {"num_latents": 30, "iterations": 5, "stage_epochs": 3.84},  # 600 steps
    "coconut": {"num_latents": 10, "stage_epochs": 3.84},
    "all": {"per_device_train_batch_size": 256, "max_steps": 5000, "learning_rate": 1e-3, "warmup_steps": 200},
}
# Changes for five operations, of which the teacher writes four: as many latent tokens for each as with three
CHAINS = {
    "codi": {"num_latents": 12},
    "pccot": {"num_latents": 24},
    "kava": {"num_latents": 24},
    "lotus": {"num_latents": 30, "iterations": 5, "stage_epochs": 0.32},  # 200 steps
    "coconut": {"num_latents": 10, "stage_epochs": 0.32},
    "all": {"max_steps": 1500},
}
CHANGES: dict[str, dict[str, dict]] = {"small": {}, "chains": CHAINS, "large": LARGE}
SIZES = {
    "small": equations.SMALL,
    "chains": dataclasses.replace(equations.SMALL, operations=5, warm_start_steps=2000),
    "large": equations.LARGE,
}


def settings(method: str, size: str, changes: dict, seed: int, steps: int | None) -> tuple[ScriptArguments, dict]:
    """The recipe's own arguments, and the trainer's arguments with this run's changes."""
    found = yaml.safe_load((ROOT / f"recipes/configs/{method}_tiny.yaml").read_text())
    names = {f.name for f in dataclasses.fields(ScriptArguments)}
    script = ScriptArguments(**{k: v for k, v in found.items() if k in names})
    args = {k: v for k, v in found.items() if k not in names}
    other = CHANGES[size]
    script.max_new_tokens *= 2 if other else 1
    args |= other.get(method, {}) | changes | other.get("all", {})
    args |= {"use_cpu": not setups.CUDA, "seed": seed, "save_strategy": "no", "disable_tqdm": True}
    return script, args | ({"max_steps": steps} if steps else {})


def settings_of(variant: str, size: str, seed: int, steps: int | None) -> tuple[str, ScriptArguments, dict]:
    """The method of a variant, and what `settings` returns for it. Plain SFT has PCCoT's settings."""
    method, changes = VARIANTS[variant]
    script, args = (
        settings("pccot", size, LONG, seed, steps) if method == "sft" else settings(method, size, changes, seed, steps)
    )
    return method, script, args


def made_with(variant: str, size: str, seed: int, options: Any) -> str:
    """A digest of all that a run depends on."""
    _, script, args = settings_of(variant, size, seed, options.steps)
    return digest([VARIANTS[variant], dataclasses.asdict(script), args, options.sft_steps, options.held_out])


def run(
    variant: str, size: str, seed: int, steps: int | None, base: str, train: list[dict], held_out: list[dict]
) -> dict:
    """Train one run from the warm start `base`, and evaluate it."""
    method, script, args = settings_of(variant, size, seed, steps)
    args["output_dir"] = tempfile.mkdtemp()
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    common = {"processing_class": tokenizer, "peft_config": script.lora()}
    if method == "sft":
        known = {f.name for f in dataclasses.fields(SFTConfig)}
        config = SFTConfig(
            **{k: v for k, v in args.items() if k in known}, max_length=None, gradient_checkpointing=False
        )
        data = equations.explicit(train, VARIANTS[variant][1]["steps"])
        trainer = SFTTrainer(AutoModelForCausalLM.from_pretrained(base), config, train_dataset=data, **common)
    else:
        trainer_class, config_class = TRAINERS[method]
        data = Dataset.from_list(train)
        trainer = trainer_class(base, config_class(**args), train_dataset=data, **common)
    start = time.time()
    trainer.train()
    seconds = round(time.time() - start, 1)
    how = {"answer_prompt": args["answer_prompt"], "max_new_tokens": script.max_new_tokens, "batch_size": 250}
    measured = {}
    for name in ("off",) if method == "sft" else ("on", *ABLATIONS):
        found = evaluate_answers(trainer.model, tokenizer, held_out, latents=name, **how)
        measured[name] = {**found.numbers(), "right": "".join(str(int(x)) for x in found.right)}
    first = next(iter(measured))
    alone = evaluate_answers(trainer.model, tokenizer, held_out[:ALONE], latents=first, **{**how, "batch_size": 1})
    measured[first]["seconds_alone"] = alone.seconds
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    curve = [[entry["step"], *(entry.get(f"loss/{name}") for name in TERMS)] for entry in logged[4::5]]
    return {"steps": args["max_steps"], "seconds": seconds, "losses": curve, **measured}


def table(results: dict[str, dict[str, dict]]) -> str:
    """A Markdown table over the seeds.

    It has the mean accuracy with its bootstrap interval, each seed's accuracy, the accuracy with ablated latent tokens,
    and the shortest times, which other work on the machine disturbs least.
    """
    latent = [run for by_seed in results.values() for run in by_seed.values() if "on" in run]
    ablations = [name for name in ABLATIONS if all(name in run for run in latent)]  # files of earlier runs have fewer
    headings = [
        "",
        "accuracy (95% interval)",
        "of each seed",
        "steps",
        *ablations,
        "passes",
        "ms in batches",
        "ms alone",
        "s a run",
    ]
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for name, by_seed in results.items():
        runs = [by_seed[seed] for seed in sorted(by_seed, key=int)]
        main = [r.get("on") or r["off"] for r in runs]
        low, high = bootstrap_interval([[c == "1" for c in m["right"]] for m in main])
        mean = lambda key, found: statistics.mean(f[key] for f in found)  # noqa: E731
        least = lambda key, found: min(f[key] for f in found)  # noqa: E731
        ablated = [f"{mean('accuracy', [r[a] for r in runs]):.1%}" if "on" in runs[0] else "" for a in ablations]
        cells = [
            name,
            f"{mean('accuracy', main):.1%} ({low:.1%} to {high:.1%})",
            ", ".join(f"{m['accuracy']:.0%}" for m in main),
            f"{mean('steps', runs):,.0f}",
            *ablated,
            f"{mean('forward_passes', main):.1f}",
            f"{least('seconds', main) * 1000:.2f}",
            f"{least('seconds_alone', main) * 1000:.0f}",
            f"{least('seconds', runs):.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read(path: Path) -> dict[str, dict[str, dict]]:
    """The finished runs, including those of another process that works on other seeds."""
    return json.loads(path.read_text())["results"] if path.exists() else {}


def main() -> None:
    parser = CommandLine(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the configurations' number")
    parser.add_argument("--sft_steps", type=int, help="for the warm start, instead of the task's number")
    parser.add_argument("--size", choices=SIZES, default="large" if setups.CUDA else "small")
    parser.add_argument("--held_out", type=int, default=500)
    parser.add_argument("--only", nargs="*", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--cache", default="runs/cache")
    parser.add_argument("--fresh", action="store_true")
    options = parser.parse_args()
    patches.apply("fused_lm_head")
    disable_progress_bars()
    name = "latent" if options.size == "small" else f"latent_{options.size}"
    path, _ = setups.so_far(name, options.fresh, {})
    size = SIZES[options.size]
    note = f"{options.held_out} held-out questions of {size.operations} operations"
    for seed in options.seeds:
        base = warm_start.tiny_with_steps(
            Path(options.cache),
            seed=seed,
            held_out=options.held_out,
            steps=options.sft_steps or size.warm_start_steps,
            size=size,
            progress=False,
        )
        train, held_out = equations.split(options.held_out, seed, size)
        for variant in options.only:
            wanted = made_with(variant, options.size, seed, options)
            if read(path).get(variant, {}).get(str(seed), {}).get("made_with") == wanted:
                continue
            last = run(variant, options.size, seed, options.steps, base, train, held_out) | {"made_with": wanted}
            accuracy = (last.get("on") or last["off"])["accuracy"]
            print(f"seed {seed}  {variant}: {accuracy:.3f} in {last['seconds']} s", flush=True)
            results = read(path)
            results.setdefault(variant, {})[str(seed)] = last
            setups.write(name, {"command": "make bench-latent", "setting": note, "results": results})
            gc.collect()
    PlainConsole().print(table(in_order(read(path), VARIANTS)))
    setups.write_table(path, page)
    print(path)


def page(found: dict) -> str:
    """The table of benchmarks/results/latent_<device>.md."""
    results = in_order(found["results"], VARIANTS)
    return f"""# Latent tokens over seeds

{seeds_of(results)} seeds, {found["setting"]}. Every method starts from the same warm start.

- SFT without steps answers at once; SFT with steps writes the steps out. Pause tokens are PCCoT with T = 0, without
  distillation. "9 by ..." keeps nine of the twelve tokens of the teacher's trace, chosen by that scorer. "read": the LM
  head reads the latent tokens as tokens of the steps (`w_latent_ce=1`).
- zero, shuffle, noise: accuracy when the latent tokens are replaced by zeros, by another question's, or by noise.
- passes: forward passes for a question. Milliseconds are for a question, in batches of 250 and alone; times are the
  fastest of the seeds, on one thread, with other work on the machine.

{table(results)}"""


TABLES = {"latent": page, "latent_chains": page, "latent_large": page}


if __name__ == "__main__":
    in_sentences()
    main()
