"""What the training recipes share: what is checked before anything is loaded, and how a run ends."""

import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import ProgressCallback, Trainer, TrainingArguments

from .checkpointing import last_complete_checkpoint
from .report import CompactProgress, plot_curves, write_summary
from .tasks.evaluation import AccuracyCallback


def start(args: TrainingArguments, model_name: str, embedded: tuple[str, ...]) -> tuple[Console, Path, str | None]:
    """The console, the output folder, and the checkpoint that `resume_from_checkpoint` asks for (`latest`: the newest whole
    one).

    Raises:
        SystemExit: an embedded model in several processes, or no checkpoint to resume from.
    """
    if args.world_size > 1 and model_name in embedded:
        sys.exit(f"--model_name {model_name} trains in one process; give a hub id or a folder to accelerate launch")
    output, resume = Path(args.output_dir), args.resume_from_checkpoint
    if resume == "latest":
        resume = last_complete_checkpoint(output) or sys.exit(f"no complete checkpoint in {output} to resume from")
    return Console(quiet=args.process_index > 0), output, str(resume) if resume else None


def compact_progress(trainer: Trainer) -> None:
    """A progress bar with a few figures in place of a dictionary on every log."""
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(CompactProgress)


def finish(
    trainer: Trainer,
    console: Console,
    started: float,
    title: tuple[str, ...],
    measured: AccuracyCallback,
    after: Any,
    curves: tuple,
    **more: Any,
) -> None:
    """Writes `curves.png` and `summary.json` beside `final/`.

    Args:
        started: `time.time()` at the beginning.
        title: of the picture; what repeats is said once.
        measured: accuracy before and during training.
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
    console.print(f"Written: {output / 'final'}, {output / 'summary.json'}, {output / 'curves.png'}")
