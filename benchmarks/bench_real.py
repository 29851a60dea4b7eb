"""Every method against its control on a pretrained model, SmolLM2-135M, and word problems with steps, at an equal budget.

    make bench-real                                                    # on a CPU: the small budget, hours
    make bench-real ARGS="--minutes 50"                                # a piece of it; the next call goes on
    make bench-real ARGS="--dataset train.jsonl --eval_dataset test.jsonl"     # GSM8K's files, or any with steps

All runs of a seed begin with one model that was tuned on written steps. Each has the same number of steps and of rows in
a step. Runs are in order of value. They are checkpointed, so that an interrupted one goes on where it was. Writes
benchmarks/results/real_<device>.json after every run, and the table beside it. Finished runs are not repeated.
"""

import argparse
import dataclasses
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset, disable_progress_bars
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

import patches
from benchmarks import setups
from benchmarks.over_seeds import ROOT, arguments, in_order, seeds_of, table
from trl_ext import (
    CoconutConfig,
    CoconutTrainer,
    CODIConfig,
    CODITrainer,
    HRPOConfig,
    HRPOTrainer,
    KAVAConfig,
    KAVATrainer,
    LOTUSConfig,
    LOTUSTrainer,
    PCCoTConfig,
    PCCoTTrainer,
)
from trl_ext.cli.console import PlainConsole
from trl_ext.cli.report import compact_progress
from trl_ext.cli.user_errors import in_sentences
from trl_ext.common.fingerprint import digest
from trl_ext.latent.evaluation import evaluate_answers
from trl_ext.latent.sources import load_rows
from trl_ext.tasks import warm_start, word_problems
from trl_ext.tasks.data import without
from trl_ext.tasks.evaluation import evaluate
from trl_ext.tasks.reward import make_reward
from unsloth_ext.common.ablations import ABLATIONS


PROMPT, SEPARATOR = "#", ";"  # before the answer, after each step
LATENT = {"off": "steps", "on": "latents"} | {name: name for name in ABLATIONS}


@dataclass(frozen=True)
class Budget:
    """How much each run gets.

    Attributes:
        rows: number of rows in a step; of completions for reinforcement.
        warm_up: number of steps of the common start.
        steps: number of steps of each run.
        reinforced: number of steps of each run with rewards.
        held_out: number of held-out problems.
        most: most tokens of a completion with steps.
    """

    rows: int
    warm_up: int
    steps: int
    reinforced: int
    held_out: int
    most: int = 64


BUDGETS = {
    "check": Budget(rows=4, warm_up=2, steps=6, reinforced=2, held_out=4),  # whether all runs work
    "small": Budget(rows=16, warm_up=40, steps=100, reinforced=30, held_out=200),
    "full": Budget(rows=64, warm_up=200, steps=2000, reinforced=300, held_out=1000, most=192),
}
RATES = {"learning_rate": 2e-4, "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 10, "max_grad_norm": 1.0}

# What the shipped configurations of latent tokens have, at this model's width. Each step that the teacher keeps has three
# latent tokens, which stand for its result; where they are not read, it has one
READ = {"latents_per_step": 3, "latent_ce_tokens": "results", "w_latent_ce": 1.0}
LOOPED = {"iterations": 3}
LATENT_RUNS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "CODI": (CODITrainer, CODIConfig, {**READ, "projection_dim": 576}),
    "PCCoT": (PCCoTTrainer, PCCoTConfig, {**READ, **LOOPED}),
    "KaVa": (KAVATrainer, KAVAConfig, {**READ, **LOOPED, "projection_dim": 576, "w_codi": 1.0, "w_kv": 1.0}),
    "LOTUS": (
        LOTUSTrainer,
        LOTUSConfig,
        {**READ, **LOOPED, "latent_ce_passes": "all", "stage_epochs": 0.1},
    ),
    "CODI, SIM-CoT": (CODITrainer, CODIConfig, {"projection_dim": 576, "w_step_decoder": 1.0}),
    "PCCoT, not read": (PCCoTTrainer, PCCoTConfig, {**LOOPED, "latents_per_step": 3}),
    "CODI, not read": (CODITrainer, CODIConfig, {"projection_dim": 576}),
    "Coconut": (
        CoconutTrainer,
        CoconutConfig,
        {"latents_per_step": 1, "stage_epochs": 0.15, "reset_optimizer": False},
    ),
}
OPEN = {"residual_r_min": 0.3, "residual_r_max": 0.7, "lr_residual_lambda": 1e-2, "lr_residual_gate": 1e-3}
REINFORCED: dict[str, dict[str, Any]] = {
    "GRPO": {"thinking": False},
    "HRPO, soft embeddings": {"thinking_source": "soft_embedding", **OPEN},
    "HRPO, soft embeddings, the paper's gates": {"thinking_source": "soft_embedding"},
}
EXPLICIT = {"SFT with steps": True, "SFT without steps": False}
RUNS = [*EXPLICIT, "PCCoT", "CODI", *list(REINFORCED)[:2], *list(LATENT_RUNS)[2:], *list(REINFORCED)[2:]]


CURVE = ("step", "loss", "reward", "loss/ce_student", "loss/latent_ce", "latent/right_tokens", "loss/step_decoder")


class Pause(TrainerCallback):
    """Save a checkpoint and stop at a time, so that the next call goes on from there."""

    def __init__(self, at: float):
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() > self.at:
            control.should_save = control.should_training_stop = True


class PausedError(Exception):
    """The time is over, and the run is saved."""


@dataclass
class Task:
    """What all runs of a seed share.

    Attributes:
        budget: how much each run gets.
        train, held_out: rows with `question`, `steps` and `answer`.
        kept: the number of steps, but the last, that latent tokens stand for.
        folder: where unfinished runs and the common start are kept.
        seed: of the data and of the runs.
        until: the time, on the clock `time.monotonic`, at which runs are to pause.
    """

    budget: Budget
    train: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    kept: int
    folder: Path
    seed: int
    until: float

    def common(self, name: str, steps: int) -> dict[str, Any]:
        """Arguments that every trainer has."""
        return {
            **RATES,
            "output_dir": str(self.folder / name),
            "max_steps": steps,
            "seed": self.seed,
            "per_device_train_batch_size": self.budget.rows,
            "use_cpu": not setups.CUDA,
            "bf16": True,
            "gradient_checkpointing": False,
            "report_to": "none",
            "logging_steps": max(1, steps // 20),
            "save_steps": 50,
            "save_total_limit": 1,
        }

    def trained(self, trainer: Trainer) -> dict[str, Any]:
        """Train to the end, and return what a run costs.

        Raises:
            PausedError: the time is over before.
        """
        output = Path(trainer.args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        clock = output / "seconds"
        spent = float(clock.read_text()) if clock.exists() else 0.0
        trainer.add_callback(Pause(self.until))
        compact_progress(trainer)
        start = time.time()
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)))
        seconds = spent + time.time() - start
        if trainer.state.global_step < trainer.args.max_steps:
            clock.write_text(str(seconds))
            raise PausedError
        history = [entry for entry in trainer.state.log_history if "loss" in entry or "reward" in entry]
        return {"seconds": round(seconds, 1), "curve": [{k: e[k] for k in CURVE if k in e} for e in history]}

    def start(self) -> str:
        """The folder of the model that all runs begin with, and of its tokenizer."""
        done = self.folder / "start"
        if not (done / "tokenizer_config.json").exists():
            base = warm_start.smollm2(ROOT / "runs/cache")
            tokenizer = AutoTokenizer.from_pretrained(base)
            trainer = self.sft(base, "warm_up", self.budget.warm_up, True)
            self.trained(trainer)
            trainer.save_model(str(done))
            tokenizer.save_pretrained(done)
            shutil.rmtree(self.folder / "warm_up", ignore_errors=True)
        return str(done)

    def sft(self, base: str, name: str, steps: int, written: bool) -> trl.SFTTrainer:
        """TRL's trainer on rows that write the steps, or only the answer."""
        set_seed(self.seed)
        rows = [
            {
                "prompt": row["question"],
                "completion": "".join(step + SEPARATOR for step in row["steps"] if written) + PROMPT + row["answer"],
            }
            for row in self.train
        ]
        config = trl.SFTConfig(**self.common(name, steps), max_length=None)
        return trl.SFTTrainer(
            AutoModelForCausalLM.from_pretrained(base),
            config,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(base),
        )


def explicit(task: Task, name: str) -> dict[str, Any]:
    """Plain SFT: the controls of latent tokens."""
    base = task.start()
    trainer = task.sft(base, name, task.budget.steps, EXPLICIT[name])
    cost = task.trained(trainer)
    return cost | answered(trainer.model, AutoTokenizer.from_pretrained(base), task, ("off",))


def latent(task: Task, name: str) -> dict[str, Any]:
    """A method with latent tokens, with what it reads replaced, and with steps written."""
    trainer_class, config_class, changes = LATENT_RUNS[name]
    base = task.start()
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = config_class(
        **task.common(name, task.budget.steps),
        **{"answer_prompt": PROMPT, "step_separator": SEPARATOR, "drop_last_step": True, **changes},
        num_latents=task.kept * changes.get("latents_per_step", 1),
    )
    config.stage_epochs *= (
        task.budget.steps * task.budget.rows / len(task.train)
    )  # in `LATENT_RUNS`: a share of the run
    set_seed(task.seed)
    trainer = trainer_class(base, config, train_dataset=Dataset.from_list(task.train), processing_class=tokenizer)
    cost = task.trained(trainer)
    return cost | answered(trainer.model, tokenizer, task, ("on", *ABLATIONS, "off"))


def answered(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, task: Task, kinds: tuple[str, ...]
) -> dict[str, Any]:
    """Accuracy of generated answers with each kind of latent tokens."""
    found: dict[str, Any] = {}
    for kind in kinds:
        measured = evaluate_answers(
            model,
            tokenizer,
            task.held_out,
            answer_prompt=PROMPT,
            max_new_tokens=task.budget.most,
            batch_size=100,
            latents=kind,
        )
        found[LATENT[kind]] = measured.accuracy
        if kind == kinds[0]:
            found |= {key: getattr(measured, key) for key in ("low", "high", "forward_passes")}
            found |= {"accuracy": measured.accuracy, "texts": measured.completions[:3]}
    return found


def reinforced(task: Task, name: str) -> dict[str, Any]:
    """Reinforcement: GRPO, or HRPO with its states replaced."""
    changes = REINFORCED[name]
    base = task.start()
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
    rows = [{"prompt": row["question"], "answer": row["answer"]} for row in task.train]
    kind, trainer_class = (
        (HRPOConfig, HRPOTrainer) if changes.get("thinking", True) else (trl.GRPOConfig, trl.GRPOTrainer)
    )
    settings = task.common(name, task.budget.reinforced) | {
        "per_device_train_batch_size": 2 * task.budget.rows,
        "num_generations": 8,
        "max_completion_length": task.budget.most,
        "learning_rate": 2e-5,
        "temperature": 1.0,
        "beta": 0.0,
        "logging_steps": 1,
        "save_steps": 10,
    }
    if kind is HRPOConfig:
        settings |= {"answer_delimiter": PROMPT, **changes}
    set_seed(task.seed)
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(base),
        make_reward(PROMPT),
        kind(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    held_out = Dataset.from_list([{"prompt": row["question"], "answer": row["answer"]} for row in task.held_out])
    how = {"delimiter": PROMPT, "max_new_tokens": task.budget.most, "batch_size": 100}
    before = evaluate(trainer.model, tokenizer, held_out, **how, thinking="off")
    cost = task.trained(trainer)
    after = {
        state: evaluate(trainer.model, tokenizer, held_out, **how, thinking=state)
        for state in (("on", "zero", "shuffle", "noise") if kind is HRPOConfig else ("on",))
    }
    main = after["on"]
    return {
        **cost,
        "before": before.accuracy,
        **{key: getattr(main, key) for key in ("accuracy", "low", "high")},
        "forward_passes": main.mean_length,
        "texts": main.completions[:3],
        **{state: found.accuracy for state, found in after.items() if state != "on"},
    }


def work_of(name: str) -> Callable[[Task, str], dict[str, Any]]:
    """The function that does a run."""
    return explicit if name in EXPLICIT else reinforced if name in REINFORCED else latent


COLUMNS = (
    ("accuracy", "accuracy", ".1%"),
    ("low", "from", ".1%"),
    ("high", "to", ".1%"),
    ("before", "before", ".1%"),
    ("steps", "steps written", ".1%"),
    *((name, name, ".1%") for name in ABLATIONS),
    ("forward_passes", "passes", ".1f"),
    ("seconds", "s a run", ".0f"),
)


def rows_of(options: argparse.Namespace, budget: Budget, seed: int) -> tuple[list[dict], list[dict], int]:
    """Rows to train on, held-out rows, and how many steps latent tokens stand for."""
    size = 2 * max(budget.steps, budget.warm_up) * budget.rows
    if options.dataset is None:
        return *word_problems.split(size, budget.held_out, seed), 2 * word_problems.ANIMALS - 2
    held_out = load_rows(options.eval_dataset, size=budget.held_out, need_steps=False).usable
    return without(load_rows(options.dataset).usable, held_out), held_out, 6


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
master weights.

- accuracy: greedy, as the method answers, with its 95% interval for one seed; "steps written": of the same model when it
  writes the steps; zero, shuffle, noise, interpolate: with its latent tokens or thinking states replaced.
- passes: forward passes for a question, with rewards tokens of a completion.

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
    data = Path(options.dataset).name if options.dataset else "legs"
    made_with = {"budget": options.budget, "dataset": data, "common": digest([dataclasses.asdict(budget), RATES])}
    path, results = setups.so_far("real", options.fresh, made_with)
    for seed in options.seeds:
        folder = ROOT / f"runs/real/{digest([made_with, seed, setups.device_name()])[:12]}"
        task = Task(budget, *rows_of(options, budget, seed), folder, seed, until)
        for name in options.only:
            changes = LATENT_RUNS[name][-1] if name in LATENT_RUNS else REINFORCED.get(name)
            settings = digest([changes, made_with])
            if results.get(name, {}).get(str(seed), {}).get("made_with") == settings:
                continue
            try:
                found = work_of(name)(task, name)
            except PausedError:
                print(f"seed {seed}  {name}: paused; the same command goes on")
                return
            shutil.rmtree(folder / name, ignore_errors=True)
            results.setdefault(name, {})[str(seed)] = found | {"made_with": settings}
            print(f"seed {seed}  {table({name: {seed: found}}, COLUMNS).splitlines()[-1]}", flush=True)
            setups.write("real", {"command": "make bench-real", "made_with": made_with, "results": results})
            setups.write_table(path, page)
    PlainConsole().print(table(in_order(results, RUNS), COLUMNS))
    print(path)


if __name__ == "__main__":
    in_sentences()
    main()
