"""What all runs of bench_real share: the budget, the rows, the common start, checkpoints, and how answers are measured."""

import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from benchmarks import setups
from benchmarks.over_seeds import ROOT
from trl_ext.cli.report import compact_progress
from trl_ext.latent.evaluation import evaluate_answers
from trl_ext.tasks import warm_start


PROMPT, SEPARATOR = "#", ";"  # before the answer, after each step
BATCH = 100  # problems in a batch of evaluation


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

CURVE = (
    *("step", "loss", "reward", "loss/ce_student", "loss/latent_ce", "latent/right_tokens", "loss/step_decoder"),
    *("loss/ce", "kv/loss", "concept/ratio", "loss/executor"),
)


class Pause(TrainerCallback):
    """Save a checkpoint and stop at a time, so that the next call goes on from there.

    Beside the checkpoints it keeps the seconds that they took.
    """

    def __init__(self, at: float, clock: Path):
        self.at, self.clock = at, clock
        self.start = time.time() - (float(clock.read_text()) if clock.exists() else 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if time.monotonic() > self.at:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.clock.write_text(str(self.seconds))

    @property
    def seconds(self) -> float:
        """The time so far, that before an interruption included."""
        return time.time() - self.start


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

    @property
    def decoding(self) -> dict[str, Any]:
        """Arguments of evaluations that write steps and answer."""
        return {"delimiter": PROMPT, "max_new_tokens": self.budget.most, "batch_size": BATCH}

    def trained(self, trainer: Trainer) -> dict[str, Any]:
        """Train to the end, and return what a run costs.

        Raises:
            PausedError: the time is over before.
        """
        output = Path(trainer.args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        pause = Pause(self.until, output / "seconds")
        trainer.add_callback(pause)
        compact_progress(trainer)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(output)))
        seconds = pause.seconds
        if trainer.state.global_step < trainer.args.max_steps:
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
        config = trl.SFTConfig(**self.common(name, steps), max_length=None)
        return trl.SFTTrainer(
            AutoModelForCausalLM.from_pretrained(base),
            config,
            train_dataset=completed(self.train, written),
            processing_class=AutoTokenizer.from_pretrained(base),
        )


def completed(rows: list[dict[str, Any]], written: bool = True) -> Dataset:
    """Columns `prompt`, `completion` and `answer`. A completion has the steps, unless `written` is false."""
    return Dataset.from_list(
        [
            {
                "prompt": row["question"],
                "completion": "".join(step + SEPARATOR for step in row["steps"] if written) + PROMPT + row["answer"],
                "answer": row["answer"],
            }
            for row in rows
        ]
    )


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
            batch_size=BATCH,
            latents=kind,
        )
        if kind != kinds[0]:
            found["steps" if kind == "off" else kind] = measured.accuracy
        else:
            found |= {key: getattr(measured, key) for key in ("low", "high", "forward_passes")}
            found |= {"accuracy": measured.accuracy, "texts": measured.completions[:3]}
    return found
