"""The `--help` text of flags: titled groups with the method's own flags first, and the kind of each value."""

import argparse
import inspect
import textwrap
import types
from typing import Any, Union, get_args, get_origin


OURS = ("trl_ext", "unsloth_ext", "__main__")
GENERAL = "General"
USUAL_TITLE = "Training, the flags used most"
REST = "Training, the rest"
# Help for fields of TRL and transformers that nearly every run sets, as they work here
USUAL = {
    "output_dir": "Folder for checkpoints, the trained model and the summary.",
    "resume_from_checkpoint": "Resume from 'latest', checkpoint-N of output_dir, or a checkpoint's folder.",
    "max_steps": "Number of optimizer steps; -1: use num_train_epochs.",
    "num_train_epochs": "Number of passes over the training rows if max_steps is -1.",
    "learning_rate": "Peak learning rate of parameters without a rate of their own.",
    "lr_scheduler_type": "Schedule of the learning rate.",
    "warmup_steps": "Steps of warm-up; a number below 1 is a share of all steps.",
    "per_device_train_batch_size": "Rows (in reinforcement learning: completions) per device and micro-batch.",
    "gradient_accumulation_steps": "Number of micro-batches per optimizer step.",
    "num_generations": "Number of completions per prompt in a rollout.",
    "max_completion_length": "Maximum length of a completion in a rollout, in tokens.",
    "temperature": "Sampling temperature of rollouts; 1 is the model's own distribution.",
    "beta": "Coefficient of the KL to the reference model; 0: no reference model.",
    "max_length": "Maximum length of a row in tokens; longer rows are truncated.",
    "logging_steps": "Number of steps between two logs.",
    "save_strategy": "When checkpoints are saved.",
    "save_steps": "Number of steps between two checkpoints.",
    "seed": "Seed of all random numbers in training.",
    "bf16": "Compute in bfloat16.",
    "use_cpu": "Train on the CPU even if there is a GPU.",
    "report_to": "Experiment tracker: none, tensorboard, wandb, ...",
}
PACKAGES = {"trl": "TRL", "transformers": "transformers"}
METAVARS = {int: "N", float: "NUMBER", bool: "true|false", dict: "JSON"}


def title_of(dtype: type, name: str | None) -> str:
    """The title of the group that a field belongs to: `flags_title` of our first class that declares it.

    Args:
        dtype: a dataclass of flags.
        name: name of the field; None: the title of the class itself.
    """
    declaring = [cls for cls in dtype.__mro__ if name in inspect.get_annotations(cls)]
    ours = [cls for cls in declaring if cls.__module__.split(".")[0] in OURS]
    if ours or name is None:
        return next((cls.flags_title for cls in (*ours[::-1], dtype) if hasattr(cls, "flags_title")), "Flags")
    package = declaring[-1].__module__.split(".")[0]
    return USUAL_TITLE if name in USUAL else f"{REST} ({PACKAGES.get(package, package)})"


def plain_type(hint: Any) -> Any:
    """The type of a field without None, or the element type of a list; None if several types are left."""
    given = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    kinds = [kind for kind in given if kind is not type(None)]
    if len(kinds) == 2 and str in kinds:  # given as JSON on a command line
        kinds.remove(str)
    if get_origin(kinds[0]) is list:
        return plain_type(get_args(kinds[0])[0])
    return (get_origin(kinds[0]) or kinds[0]) if len(kinds) == 1 else None


class FlagsHelp(argparse.ArgumentDefaultsHelpFormatter):
    """A help formatter that prints flags with their values on one line and never breaks names, paths and addresses."""

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
    """A default value as one would type it, with `%` escaped for argparse."""
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
