"""Start and resume of a recipe's run: its folder is claimed, and an interruption says how to resume."""

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list
from transformers import TrainingArguments

from trl_ext.cli import user_errors

from ..common import run_folder
from ..common.checkpointing import STATE_FILE, CheckpointError, broken_file, last_complete_checkpoint, no_steps_left


# What gloo and NCCL say when a process at the other end is gone
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited", "NCCL error")


def claim(args: TrainingArguments, overwrite: bool, second_stage: bool = False) -> tuple[str, Path | None]:
    """Claim the output folder. The first process decides for all.

    Args:
        args: the trainer's configuration.
        overwrite: delete an earlier run in the output folder.
        second_stage: the recipe has `--init_from`, which is then suggested if no steps are left.

    Returns:
        The run's id, and the checkpoint that `resume_from_checkpoint` asks for.

    Raises:
        ValueError: the folder cannot be written to, is in use or holds another run; or there is no such checkpoint, or
            no steps are left after it.
    """
    found: list = [None, None, None]
    if args.process_index == 0:
        try:
            found = [*_claim(args, overwrite, second_stage), None]
        except ValueError as error:
            found = [None, None, str(error)]
    if args.world_size > 1:
        broadcast_object_list(found)
    run, checkpoint, problem = found
    if problem:
        raise run_folder.FolderError(problem)
    return run, checkpoint


def _claim(args: TrainingArguments, overwrite: bool, second_stage: bool) -> tuple[str, Path | None]:
    asked = str(args.resume_from_checkpoint or "")
    if asked.lower() in ("false", "none"):
        asked = ""
    if asked and overwrite:
        raise run_folder.FolderError(
            f"--overwrite would delete what --resume_from_checkpoint {asked} resumes from: leave one of them out"
        )
    output = run_folder.writable_folder(args.output_dir, "--output_dir")
    run_folder.lock(output)
    if not asked:
        return run_folder.begin(output, overwrite), None
    checkpoint = find_checkpoint(output, asked)
    step = check_steps_left(args, checkpoint, second_stage)
    if checkpoint.resolve().parent == output.resolve():
        return run_folder.go_on(output, step), checkpoint
    return run_folder.begin(output, overwrite), checkpoint


def find_checkpoint(output: Path, asked: str) -> Path:
    """The folder that `resume_from_checkpoint` names.

    Args:
        output: the output folder.
        asked: a path, a name in the output folder, or `latest` or `true` for the newest complete checkpoint of the run
            there.

    Raises:
        CheckpointError: there is no such checkpoint.
    """
    if asked.lower() in ("latest", "true"):
        found = last_complete_checkpoint(output)
        if found is None:
            raise CheckpointError(
                f"--resume_from_checkpoint {asked}: no complete checkpoint in {output} to resume from"
            )
        return found
    for path in (Path(asked), output / asked):
        if path.is_dir():
            return path
    there = ", ".join(path.name for _, path in run_folder.checkpoints(output)) or "no checkpoint"
    raise CheckpointError(f"--resume_from_checkpoint {asked}: no such folder here or in {output} (which has {there})")


def check_steps_left(args: TrainingArguments, checkpoint: Path, second_stage: bool) -> int:
    """The checkpoint's step.

    Raises:
        CheckpointError: no steps are left after it, or it is damaged.
    """
    problem = broken_file(checkpoint)
    if problem:
        raise CheckpointError(problem)
    state = json.loads((checkpoint / STATE_FILE).read_text())
    step, epoch = state["global_step"], state.get("epoch") or 0
    over = step >= args.max_steps if args.max_steps > 0 else epoch >= args.num_train_epochs
    if not over:
        return step
    hint = f"; for a second stage with a new schedule: --init_from {checkpoint} and another --output_dir"
    raise CheckpointError(
        no_steps_left(step, args.max_steps if args.max_steps > 0 else step) + (hint if second_stage else "")
    )


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM, for example from a job scheduler."""


def explain_the_end(folder: Path) -> None:
    """From now on, if Ctrl-C, SIGTERM, a full disk or the end of another process ends the run in this folder, print how to
    resume it."""

    def explain(error: BaseException) -> tuple[str, int] | None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a launcher ends the other processes: not before the sentence
        found = _ending(error)
        return found and (f"{found[0]}. {how_to_go_on(folder)}", found[1])

    user_errors.explainers[:] = [explain]
    signal.signal(signal.SIGTERM, _terminate)


def _ending(error: BaseException) -> tuple[str, int] | None:
    if isinstance(error, Terminated):
        return "Ended by SIGTERM", 128 + signal.SIGTERM
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted", 128 + signal.SIGINT
    if isinstance(error, RuntimeError) and any(words in str(error) for words in LOST):
        return "Another process of this run has ended, and its own message says why", 1
    full = user_errors.disk_is_full(error)
    return (full, user_errors.STATUS) if full else None


def how_to_go_on(folder: Path) -> str:
    """A sentence that names the last complete checkpoint and the command that resumes from it."""
    last = last_complete_checkpoint(folder)
    if last is None:
        return f"There is no complete checkpoint in {folder} yet, so the run cannot be resumed"
    state = json.loads((last / STATE_FILE).read_text())
    step = state["global_step"]
    more = step == run_folder.noted(folder, "resumed_at")  # a finished run was extended by more steps
    if step >= state.get("max_steps", math.inf) and not more:  # no steps are left to resume
        return f"Training had ended: {last} holds the trained model and can be used like final/"
    command = run_folder.resume_command(run_folder.command_words())
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:  # the launcher's words are not known here
        command = "the launch command that started the run, and --resume_from_checkpoint latest"
    return f"The last complete checkpoint is {last}; resume from it with: {command}"


def _terminate(number: int, frame: Any) -> None:
    raise Terminated
