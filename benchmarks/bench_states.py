"""What thinking states add on the reachability task, over seeds: GRPO, HRPO and soft tokens with the same budget, states
replaced. Latent tokens have 1,000 steps on demonstrations before it.

    make bench-states [ARGS="--seeds 0 1 2 --steps 200 --arms NAME NAME"]

Each seed has its own problems, warm start and training. The settings are those of recipes/configs/hrpo_reachability.yaml,
with the changes in `RUNS`. GRPO has two rates, of which the better one counts. Writes
benchmarks/results/states_<device>.json after every run, and at the end the table beside it and docs/hrpo_frontier.png.
Finished runs are not repeated without --fresh.
"""

import json
import statistics
import tempfile
import time
from typing import Any

import torch
import trl
import yaml
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

import patches
from benchmarks import setups
from benchmarks.over_seeds import ROOT, compare, in_order, seeds_of, table
from trl_ext import CODIConfig, CODITrainer, HRPOConfig, HRPOTrainer, LatentGRPOConfig, LatentGRPOTrainer
from trl_ext.cli.user_errors import in_sentences
from trl_ext.hrpo.frontier import frontier_shares, plot_frontier
from trl_ext.latent.evaluation import evaluate_answers
from trl_ext.tasks import reachability, warm_start
from trl_ext.tasks.evaluation import evaluate
from trl_ext.tasks.reward import make_reward


STEPS, HELD_OUT, SAMPLES = 200, 500, 4
STATES = {"on": "", "zero": "_zero", "shuffle": "_shuffle", "noise": "_noise"}  # with the endings of their results
HARD = {"off": "_hard"}  # soft tokens train, tokens answer
SOFT = "HRPO soft_embedding, rollout"
LATENTS = "latent tokens"
PROJECTION = {"thinking_source": "projection", "lr_thinking_projection": 1e-3, "thinking_norm": "embedding_rms"}
PROJECTION |= {"residual_r_min": 0.3, "residual_r_max": 0.7}
COMPARED: dict[str, dict[str, Any] | None] = {
    "warm start": None,
    "GRPO, learning rate 3e-4": {"thinking": False},
    "GRPO, learning rate 6e-4": {"thinking": False, "learning_rate": 6e-4},
    SOFT: {},
    "HRPO soft_embedding, soft_bptt": {"recompute": "soft_bptt"},
    "HRPO soft_embedding, two_pass": {"recompute": "two_pass"},
    "HRPO soft_embedding, jacobi": {"recompute": "jacobi"},
    "HRPO soft_embedding, frozen": {"recompute": "frozen"},
    "HRPO projection, rollout": PROJECTION,
    "HRPO projection, two_pass": PROJECTION | {"recompute": "two_pass"},
    "HRPO projection, jacobi": PROJECTION | {"recompute": "jacobi"},
    "HRPO projection, frozen": PROJECTION | {"recompute": "frozen"},
    "soft tokens, Gumbel": {"thinking_source": "soft_gumbel", "recompute": "frozen"},
    "soft tokens, Gaussian": {"thinking_source": "soft_gaussian", "recompute": "frozen", "noise_scale": 1.0},
    LATENTS: {"taught": 1000, "rewarded": False},  # steps on demonstrations
    f"{LATENTS}, then rewards": {"taught": 1000, "rewarded": True},
}
WEIGHTS = {
    f"r_min {low}, r_max {high}": {"residual_r_min": low, "residual_r_max": high}
    for low, high in ((0.3, 0.7), (0.5, 0.9), (0.9, 0.99), (0.99, 0.999))
}
RUNS = COMPARED | WEIGHTS


def warm_start_of(seed: int) -> str:
    """The folder of the model that all runs of a seed start from."""
    settings = yaml.safe_load((ROOT / "recipes/configs/hrpo_reachability.yaml").read_text())
    return warm_start.tiny_reachability(
        ROOT / "runs/cache",
        seed=seed,
        held_out=HELD_OUT,
        steps=settings["sft_steps"],
        delimiter=settings["answer_delimiter"],
        progress=False,
    )


def settings(changes: dict[str, Any], seed: int, steps: int, thinking: type = HRPOConfig) -> Any:
    """The trainer's configuration of a run: TRL's without thinking, ours with it."""
    kind = thinking if changes.get("thinking", True) else trl.GRPOConfig
    found = yaml.safe_load((ROOT / "recipes/configs/hrpo_reachability.yaml").read_text()) | changes
    found |= {"output_dir": tempfile.mkdtemp(), "max_steps": steps, "seed": seed, "save_strategy": "no"}
    found |= {"disable_tqdm": True, "logging_steps": 5}
    return kind(**{name: value for name, value in found.items() if name in kind.__dataclass_fields__})


def run(name: str, seed: int, steps: int) -> dict:
    """Train one run from its seed's warm start, and evaluate it with every kind of state."""
    torch.set_num_threads(1)
    patches.apply("fused_lm_head")
    base, changes = warm_start_of(seed), RUNS[name]
    if changes is not None and "rewarded" in changes:
        return latent_run(base, seed, changes["taught"], steps if changes["rewarded"] else 0)
    train, held_out = map(reachability.as_dataset, reachability.split_problems(HELD_OUT, seed))
    set_seed(seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    if changes is None:
        return measured(model, tokenizer, held_out, ("on",))
    config = settings(changes, seed, steps)
    thinks = isinstance(config, HRPOConfig)
    trainer = (HRPOTrainer if thinks else trl.GRPOTrainer)(
        model, make_reward("#"), config, train_dataset=train, processing_class=tokenizer
    )
    start = time.time()
    trainer.train()
    seconds = round(time.time() - start, 1)
    states = ((*STATES, *HARD) if config.soft_tokens else tuple(STATES)) if thinks else ("on",)
    found = measured(trainer.model, tokenizer, held_out, states)
    history = trainer.state.log_history
    if thinks and not config.soft_tokens:
        found["weight"] = [entry["thinking/hidden_ratio"] for entry in history if "thinking/hidden_ratio" in entry][-1]
    if thinks and config.thinking_source == "soft_embedding":
        found["frontier"] = {
            name: frontier_shares(trainer.model, tokenizer, held_out, delimiter="#", ablation=ablation)
            for name, ablation in (("as trained", None), ("set to zero", "zero"))
        }
    rewards = [entry["reward"] for entry in history if "reward" in entry]
    return {**found, "reward_last": statistics.mean(rewards[-3:]), "seconds": seconds}


def latent_run(base: str, seed: int, taught_steps: int, steps: int) -> dict:
    """CODI with a latent token, which the LM head reads, for each node of the demonstrations, and then GRPO."""
    problems, held_out = reachability.split_problems(HELD_OUT, seed)
    shown = reachability.demonstrations(problems, seed + 1, "#")
    rows = [(prompt, text.split()) for prompt, text in zip(shown["prompt"], shown["completion"], strict=True)]
    taught = Dataset.from_list(
        [
            {"question": prompt, "steps": [f" {node}" for node in walk[:-2]], "answer": f" {walk[-1]}"}
            for prompt, walk in rows
        ]
    )
    common = {"use_cpu": not setups.CUDA, "bf16": False, "report_to": "none", "save_strategy": "no", "seed": seed}
    common |= {"disable_tqdm": True, "logging_steps": 5, "adam_beta2": 0.99}
    supervised = CODIConfig(
        **common,
        output_dir=tempfile.mkdtemp(),
        max_steps=taught_steps,
        per_device_train_batch_size=64,
        learning_rate=1e-3,
        lr_scheduler_type="cosine",
        warmup_steps=50,
        num_latents=reachability.DEPTH,
        projection_dim=64,
        w_latent_ce=1.0,
        latent_ce_tokens="first",
        drop_last_step=False,
        answer_prompt=" #",
        step_separator="",
    )
    set_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    trainer: Any = CODITrainer(base, supervised, train_dataset=taught, processing_class=tokenizer)
    start = time.time()
    trainer.train()
    if steps:
        rewarded = settings({"max_completion_length": 4}, seed, steps, LatentGRPOConfig)
        train = reachability.as_dataset(problems)
        trainer = LatentGRPOTrainer(
            trainer.model, make_reward("#"), rewarded, train_dataset=train, processing_class=tokenizer
        )
        trainer.train()
    seconds = round(time.time() - start, 1)
    asked = [{"question": made.prompt, "answer": made.answer} for made in held_out]
    how = {"answer_prompt": "#", "max_new_tokens": 4, "batch_size": HELD_OUT}
    found = {
        f"greedy{ending}": evaluate_answers(trainer.model, tokenizer, asked, latents=state, **how).accuracy
        for state, ending in STATES.items()
    }
    return found | {"seconds": seconds}


def measured(model: Any, tokenizer: Any, held_out: Any, states: tuple[str, ...]) -> dict:
    """Greedy and sampled accuracy with each kind of state."""
    decoding = {"delimiter": "#", "max_new_tokens": reachability.MAX_NEW_TOKENS, "batch_size": HELD_OUT}
    found = {}
    for state in states:
        set_seed(0)
        each = [
            evaluate(model, tokenizer, held_out, thinking=state, do_sample=sample, **decoding).accuracy
            for sample in (False, *[True] * SAMPLES)
        ]
        ending = (STATES | HARD)[state]
        found |= {f"greedy{ending}": each[0], f"sampled{ending}": statistics.mean(each[1:])}
    return found


COLUMNS = (
    ("greedy", "greedy", ".1%"),
    ("sampled", "sampled", ".1%"),
    ("greedy_zero", "zeroed, greedy", ".1%"),
    ("sampled_zero", "sampled", ".1%"),
    ("greedy_shuffle", "shuffled, greedy", ".1%"),
    ("sampled_shuffle", "sampled", ".1%"),
    ("greedy_noise", "noise, greedy", ".1%"),
    ("sampled_noise", "sampled", ".1%"),
    ("greedy_hard", "greedy, tokens only", ".1%"),
    ("weight", "weight", ".2f"),
    ("seconds", "s per run", ".0f"),
)
TRAINED = tuple(column for column in COLUMNS if column[0] in ("greedy", "sampled", "greedy_hard", "seconds"))
REPLACED = tuple(column for column in COLUMNS if column[0].endswith(("zero", "shuffle", "noise")))
WEIGHED = tuple(column for column in COLUMNS if column[0] in ("greedy", "sampled", "greedy_zero", "weight"))


def page(found: dict) -> str:
    """The table of benchmarks/results/states_<device>.md."""
    results, made_with = found["results"], found["made_with"]
    compared = in_order(results, COMPARED)
    thinking = {name: runs for name, runs in compared.items() if "greedy_zero" in next(iter(runs.values()))}
    weights = {name: {"0": runs["0"]} for name, runs in in_order(results, (SOFT, *WEIGHTS)).items() if "0" in runs}
    frontier = results.get(SOFT, {}).get("0", {}).get("frontier", {})
    lines = [
        f"| {name}, step {step} | {' | '.join(format(share, '.1%') for share in shares.values())} |"
        for name, steps in frontier.items()
        for step, shares in enumerate(steps, 1)
    ]
    kinds = list(next(iter(frontier.values()))[0]) if frontier else []
    heads = [f"| states | {' | '.join(kinds)} |", f"|---{'|---:' * len(kinds)}|"]
    return f"""# Thinking states on the reachability task, over seeds

{seeds_of(compared)} seeds, {made_with["steps"]} steps of 32 x 8 completions, {made_with["held_out"]}; mean
(lowest..highest). Sampled accuracies are means of {SAMPLES} samples of each question. A random walk that guesses when it
has missed is right in 43.75% of cases. A walk that takes its last edge to a candidate, if it can, is right in 62.5%.

{table(compared, TRAINED)}

The same models with their states replaced: by zeros, by another row's, by noise of the same norm.

{table(thinking, REPLACED)}

## The weight of the token embedding at the start

`soft_embedding` with `rollout` and seed 0. The first row is the run above, with r_min 0.1 and r_max 0.5. Weight is the mean
sqrt(1 - a^2) of thinking tokens at the end of training, by which a state is multiplied.

{table(weights, WEIGHED)}

## What the soft embeddings hold

The mean share of the probability at each thinking step, for `{SOFT}` with seed 0.

{chr(10).join([*heads, *lines])}"""


TABLES = {"states": page}


if __name__ == "__main__":
    in_sentences()
    held_out = f"{HELD_OUT} held-out problems"
    compare(__doc__, "states", RUNS, run, STEPS, COLUMNS, held_out, page, prepare=warm_start_of)
    done = json.loads((setups.RESULTS / f"states_{setups.device_name()}.json").read_text())["results"]
    if "0" in done.get(SOFT, {}):
        title = "What the soft embeddings hold on the reachability task"
        plot_frontier(ROOT / "docs/hrpo_frontier.png", done[SOFT]["0"]["frontier"], title)
