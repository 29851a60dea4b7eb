"""How `--help` shows flags: in groups with titles, the method's own first, and what a value is."""

import argparse
import inspect
import textwrap
import types
from typing import Any, Union, get_args, get_origin


OURS = ("trl_ext", "unsloth_ext", "__main__")
GENERAL = "General"
USUAL_TITLE = "Training, the flags used most"
REST = "Training, the rest"
# TRL's and transformers' fields that nearly every run sets, in words that hold here
USUAL = {
    "output_dir": "Folder for checkpoints, the trained model and the summary.",
    "resume_from_checkpoint": "'latest', checkpoint-N of output_dir, or a checkpoint's folder: go on from there.",
    "max_steps": "Optimizer steps; -1: as many as num_train_epochs makes.",
    "num_train_epochs": "Passes over the training rows, where max_steps is -1.",
    "learning_rate": "Highest learning rate, of what has none of its own.",
    "lr_scheduler_type": "How the learning rate goes on.",
    "warmup_steps": "Steps in which the learning rate rises; below 1 a share of all steps.",
    "per_device_train_batch_size": "Rows, or in reinforcement completions, that one device takes at once.",
    "gradient_accumulation_steps": "Such batches in an optimizer step.",
    "num_generations": "Number of completions per prompt in a rollout.",
    "max_completion_length": "Longest completion in a rollout, in tokens.",
    "temperature": "Of sampling a rollout: 1 is the model's own distribution.",
    "beta": "How strongly the policy is held to the reference model; 0: not at all.",
    "max_length": "Longest row, in tokens; longer ones are cut.",
    "logging_steps": "Steps from one line of figures to the next.",
    "save_strategy": "When checkpoints are saved.",
    "save_steps": "Steps from one checkpoint to the next.",
    "seed": "Seed of all that is random in training.",
    "bf16": "Compute in bfloat16.",
    "use_cpu": "Train on the CPU even where there is a GPU.",
    "report_to": "Where figures go: none, tensorboard, wandb, ...",
}
PACKAGES = {"trl": "TRL", "transformers": "transformers"}
METAVARS = {int: "N", float: "NUMBER", bool: "true|false", dict: "JSON"}


def title_of(dtype: type, name: str | None) -> str:
    """Of the group that a field belongs to: what the first of our classes to declare it says (`flags_title`). Without a
    field, of the class itself."""
    declaring = [cls for cls in dtype.__mro__ if name in inspect.get_annotations(cls)]
    ours = [cls for cls in declaring if cls.__module__.split(".")[0] in OURS]
    if ours or name is None:
        return next((cls.flags_title for cls in (*ours[::-1], dtype) if hasattr(cls, "flags_title")), "Flags")
    package = declaring[-1].__module__.split(".")[0]
    return USUAL_TITLE if name in USUAL else f"{REST} ({PACKAGES.get(package, package)})"


def plain_type(hint: Any) -> Any:
    """A field's type without None, of a list its elements'; None where that leaves several."""
    given = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [kind for kind in given if kind is not type(None)]
    if len(kinds) == 2 and str in kinds:  # as JSON on a command line
        kinds.remove(str)
    if get_origin(kinds[0]) is list:
        return plain_type(get_args(kinds[0])[0])
    return (get_origin(kinds[0]) or kinds[0]) if len(kinds) == 1 else None


class FlagsHelp(argparse.ArgumentDefaultsHelpFormatter):
    """Flags and their values on one line, and names, paths and addresses whole, as they are to be copied."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=32)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.required:
            return f"{action.help} (required)"
        if action.default is argparse.SUPPRESS:
            return action.help or ""
        return f"{action.help} (default: {_as_typed(action.default)})".replace(" (default: )", "")

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_long_words=False, break_on_hyphens=False)


def _as_typed(value: Any) -> str:
    """A default as one would type it; with `%` as argparse wants it."""
    if isinstance(value, list):
        return " ".join(_as_typed(each) for each in value)
    if isinstance(value, bool):
        text = str(value).lower()
    elif isinstance(value, float):
        text = f"{value:g}"
    elif isinstance(value, str) and value.strip() != value:
        text = repr(value)
    else:
        text = str(value)
    return text.replace("%", "%%")
