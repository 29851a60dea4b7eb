"""What the training recipes share: flags, what is checked before anything is loaded, and how a run ends."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig
from transformers import Trainer, TrainingArguments

from trl_ext.cli.console import PlainConsole

from ..common.config_checks import at_least
from ..common.run_folder import check_apart, finished
from .report import plot_curves, write_summary
from .resuming import claim, explain_the_end


@dataclass
class LoraArguments:
    """LoRA, as a recipe's flags say it."""

    flags_title = "LoRA"

    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA; 0: none."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the layers with LoRA; 'all-linear': all of them."},
    )

    def __post_init__(self) -> None:
        at_least(self, lora_r=0, lora_alpha=1)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: a share from 0 to less than 1")

    def lora_modules(self) -> str | list[str]:
        """`lora_target_modules` as PEFT takes them."""
        return "all-linear" if self.lora_target_modules == ["all-linear"] else self.lora_target_modules

    def lora(self) -> LoraConfig | None:
        """LoRA as asked for, on a causal language model; None with rank 0."""
        if not self.lora_r:
            return None
        return LoraConfig(
            r=self.lora_r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=self.lora_modules(),
            task_type="CAUSAL_LM",
        )


@dataclass
class RecipeArguments(LoraArguments):
    """What a recipe adds to its trainer's configuration."""

    flags_title = "Model, data and evaluation"

    model_name: str = field(default="tiny", metadata={"help": "'tiny', a hub id or a folder."})
    train_size: int | None = field(default=None, metadata={"help": "Use at most this many training rows."})
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Held-out hub id or file; without one, a file's last eval_size rows are held out."},
    )
    eval_size: int = field(default=500, metadata={"help": "Number of held-out problems."})
    eval_every: int = field(default=0, metadata={"help": "Measure held-out accuracy every so many steps; 0 never."})
    eval_batch: int = field(default=250, metadata={"help": "Problems answered at once in evaluation."})
    warm_start_seed: int = field(default=0, metadata={"help": "Seed of the tiny task's data and warm start."})
    cache_dir: str = field(default="runs/cache", metadata={"help": "Where warm starts are kept between runs."})
    overwrite: bool = field(
        default=False, metadata={"help": "Delete what an earlier run has left in output_dir, and begin anew."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, train_size=1, eval_size=1, eval_every=0, eval_batch=1)


def start(args: TrainingArguments, script: Any, embedded: tuple[str, ...]) -> tuple[PlainConsole, Path, str | None]:
    """The console, the output folder, which is this run's from now on, and the checkpoint to resume from.

    Args:
        script: the recipe's own arguments: `model_name`, `overwrite`, and `init_from` where the recipe has it.

    Raises:
        ValueError: from `claim`, an embedded model in several processes, or `overwrite` of what the run begins with.
    """
    name = script.model_name
    if args.world_size > 1 and name in embedded:
        raise ValueError(f"--model_name {name} trains in one process; give a hub id or a folder to accelerate launch")
    if script.overwrite:
        check_apart(Path(args.output_dir), {**vars(args), **vars(script)})
    console = PlainConsole(quiet=args.process_index > 0)
    run, resume = claim(args, script.overwrite, hasattr(script, "init_from"))
    explain_the_end(Path(args.output_dir))
    console.print(f"Run {run} in {args.output_dir}" + (f", from {resume}" if resume else ""))
    return console, Path(args.output_dir), str(resume) if resume else None


def check_tiny(model_name: str, dataset: str) -> None:
    """Raises a ValueError where only one of model and task is the tiny one: each can be used with nothing else."""
    if (model_name == "tiny") != (dataset == "tiny"):
        raise ValueError(
            f"--model_name {model_name} --dataset {dataset}: the tiny model and the tiny task belong together"
        )


def finish(
    trainer: Trainer,
    console: PlainConsole,
    started: float,
    title: tuple[str, ...],
    measured: Any,
    after: Any,
    curves: tuple,
    **more: Any,
) -> None:
    """Writes `curves.png` and `summary.json` beside `final/`.

    Args:
        started: `time.time()` at the beginning.
        title: of the picture; what repeats is said once.
        measured: the `AccuracyCallback` of the run, with accuracy before and during training.
        after: the evaluation after it.
        more: for the summary.
    """
    output, state = Path(trainer.args.output_dir), trainer.state
    curve = [*measured.curve, (state.global_step, after.accuracy)]
    plot_curves(output / "curves.png", state.log_history, curve, ", ".join(dict.fromkeys(title)), curves)
    write_summary(
        output,
        accuracy_before=measured.before.accuracy,
        accuracy_after=after.accuracy,
        n_eval=after.n,
        steps=state.global_step,
        seconds=round(time.time() - started, 1),
        accuracy_curve=dict(curve),
        before=measured.before.numbers(),
        after=after.numbers(),
        **more,
    )
    finished(output, state.global_step)
    console.print(f"Written: {output / 'final'}, {output / 'summary.json'}, {output / 'curves.png'}")
