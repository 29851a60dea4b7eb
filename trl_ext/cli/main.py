"""`latent-reasoning COMMAND ...`, or `python -m trl_ext COMMAND ...`: the command line of this package.

Each command is a module with `main(argv) -> status`. It is imported only when it is asked for, because most commands
import torch.
"""

import importlib
import sys

from ..common.run_folder import PROGRAM
from ..common.spelling import did_you_mean
from .console import leave_pipe
from .user_errors import in_sentences


# Name: module, and what it does
COMMANDS = {
    "methods": ("trl_ext.cli.methods", "list the methods: what they do, paper, parent trainer, evidence"),
    "train": ("trl_ext.cli.train", "train with a method: train METHOD [--config FILE] [--field value ...]"),
    "defaults": ("trl_ext.cli.defaults", "show each default of a method with its source: defaults METHOD"),
    "data": ("trl_ext.tasks.check", "say which rows of a file a method can use: data check FILE --method METHOD"),
    "eval": ("trl_ext.evaluation.command", "evaluate a checkpoint of any kind: accuracy, costs, ablations"),
    "compare": ("trl_ext.evaluation.compare", "compare two evaluations of the same questions, with a paired test"),
    "chat": ("trl_ext.cli.chat", "talk to a checkpoint of any kind"),
    "card": ("trl_ext.cli.card", "complete a saved model's card with curves, evaluations and ablations"),
    "convert": ("trl_ext.cli.convert", "merge an adapter: one folder with all weights, with the method or plain"),
    "doctor": ("trl_ext.cli.doctor", "show versions, the backend and why, and the patches that apply"),
    "plan": ("trl_ext.cli.plan", "say whether a run fits into the memory of GPUs, and what it costs"),
    "completion": ("trl_ext.cli.completion", "print a shell's completion of these commands and their flags"),
}
STATUSES = """exit statuses: 0 done; 1 a check found something; 2 wrong input, told in one sentence; 130 interrupted.
Other statuses are bugs. With --traceback, errors show where they come from."""


def usage() -> str:
    """The text of `latent-reasoning --help`."""
    lines = [f"usage: {PROGRAM} COMMAND [...]", ""]
    lines += [f"  {name:12}{about}" for name, (_, about) in COMMANDS.items()]
    return "\n".join([*lines, "", f"`{PROGRAM} COMMAND --help` says more.", "", STATUSES])


def main() -> int:
    """Run the command that the command line names. Return its exit status."""
    sys.argv[0] = PROGRAM  # which messages begin with
    in_sentences()
    try:
        status = _run()
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        leave_pipe()


def _run() -> int:
    name, *others = sys.argv[1:] or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in COMMANDS:
        raise ValueError(f"{name}: there is no such command{did_you_mean(name, COMMANDS)}; --help lists them")
    return importlib.import_module(COMMANDS[name][0]).main(others)
