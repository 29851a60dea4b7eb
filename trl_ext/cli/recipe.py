"""Shared parts of the training recipes: flags, checks before anything is loaded, and the end of a run."""

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import PartialState
from peft import LoraConfig
from transformers import Trainer, TrainingArguments

from trl_ext.cli.console import PlainConsole

from ..common.config_checks import at_least
from ..common.engines import check_engine
from ..common.run_folder import check_apart, finished
from ..common.sampling import check_vllm_rollouts
from .card import complete_card
from .report import plot_curves, write_summary
from .resuming import claim, explain_the_end


@dataclass
class LoraArguments:
    """Flags of LoRA."""

    flags_title = "LoRA"

    lora_r: int = field(default=0, metadata={"help": "Rank of LoRA; 0: no LoRA."})
    lora_alpha: int = field(default=32, metadata={"help": "Scale (alpha) of LoRA."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of LoRA."})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the layers with LoRA; 'all-linear': all linear layers."},
    )

    def __post_init__(self) -> None:
        at_least(self, lora_r=0, lora_alpha=1)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"lora_dropout={self.lora_dropout}: must be from 0 to less than 1")

    def lora_modules(self) -> str | list[str]:
        """`lora_target_modules` in PEFT's format."""
        return "all-linear" if self.lora_target_modules == ["all-linear"] else self.lora_target_modules

    def lora(self) -> LoraConfig | None:
        """The LoRA configuration for a causal language model; None if the rank is 0."""
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
    """A recipe's flags besides its trainer's configuration."""

    flags_title = "Model, data and evaluation"

    model_name: str = field(default="tiny", metadata={"help": "'tiny', a hub id or a folder."})
    train_size: int | None = field(default=None, metadata={"help": "Use at most this many training rows."})
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Held-out dataset, a hub id or file; without one, the last eval_size rows of a file are held out."
        },
    )
    eval_size: int = field(default=500, metadata={"help": "Number of held-out problems."})
    eval_every: int = field(
        default=0, metadata={"help": "Number of steps between measurements of held-out accuracy; 0: never."}
    )
    eval_batch: int = field(default=250, metadata={"help": "Batch size of evaluation."})
    warm_start_seed: int = field(default=0, metadata={"help": "Seed of the data and the warm start of the tiny task."})
    cache_dir: str = field(default="runs/cache", metadata={"help": "Folder where warm starts are cached."})
    overwrite: bool = field(default=False, metadata={"help": "Delete an earlier run in output_dir and start over."})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, train_size=1, eval_size=1, eval_every=0, eval_batch=1)


def start(args: TrainingArguments, script: Any) -> tuple[PlainConsole, Path, str | None]:
    """Start or resume a run.

    Args:
        args: the trainer's configuration.
        script: the recipe's own arguments: `model_name`, `overwrite`, and `init_from` if the recipe has it.

    Returns:
        The console, the output folder, which is now locked for this run, and the checkpoint to resume from.

    Raises:
        ImportError: `use_vllm` is set, and vLLM is not installed or not in a tested version.
        ValueError: from `claim` or `check_vllm_rollouts`; with FSDP1; or if `overwrite` would delete the model or data that
            the run starts from.
    """
    check_engine(args, "A recipe")
    if getattr(args, "use_vllm", False):
        check_vllm_rollouts(args, thinks=getattr(args, "thinking", False))
    if script.overwrite:
        check_apart(Path(args.output_dir), {**vars(args), **vars(script)})
    console = PlainConsole(quiet=args.process_index > 0)
    run, resume = claim(args, script.overwrite, hasattr(script, "init_from"))
    explain_the_end(Path(args.output_dir))
    console.print(f"Run {run} in {args.output_dir}" + (f", from {resume}" if resume else ""))
    return console, Path(args.output_dir), str(resume) if resume else None


def check_tiny(model_name: str, dataset: str) -> None:
    """Raise a ValueError if only one of model and task is the tiny one: they can only be used together."""
    if (model_name == "tiny") != (dataset == "tiny"):
        raise ValueError(
            f"--model_name {model_name} --dataset {dataset}: the tiny model and the tiny task can only be used together"
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
    """Write `curves.png` and `summary.json` beside `final/`, and record the end of the run.

    Args:
        trainer: the trainer.
        console: where to print.
        started: `time.time()` at the start.
        title: parts of the picture's title; repetitions are dropped.
        measured: accuracy before and during training.
        after: the evaluation after training.
        curves: metrics to plot, with titles.
        more: further values for the summary.
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
    for sentence in complete_card(output / "final", output)[1]:
        console.print(sentence)
    finished(output, state.global_step)
    console.print(f"Written: {output / 'final'}, {output / 'summary.json'}, {output / 'curves.png'}")


def leave() -> None:
    """End the process group, once the trainer is freed: at exit, several processes might abort.

    A vLLM engine in this process ends it by itself at exit, and would miss it.
    """
    parallel = sys.modules.get("vllm.distributed.parallel_state")
    if parallel is None or not parallel.model_parallel_is_initialized():
        PartialState().destroy_process_group()
