"""The record that declares a method on the training side.

The folder of a method holds a file `method.py` with one `METHOD = TrainingMethod(...)`. Exports, make targets, progress
bars, curves, the GPU check and the documentation's index read these records. Records import no heavy packages.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from unsloth_ext.common.method import Method, all_methods, check_tuples, file_of, records


class Command:
    """A make target and the scripts that it runs."""

    def __init__(
        self,
        name: str,
        about: str,
        *scripts: str,
        configs: str = "",
        arguments: tuple[str, ...] = (),
        vllm: bool = False,
        trainer: str = "",
        parent: str = "",
        paper: str = "",
        what: str = "",
        evidence: str = "",
        data: tuple[Any, ...] = (),
    ):
        """
        Args:
            name: of the target, such as "train-hrpo". `latent-reasoning train hrpo` runs it too.
            about: one line for `make help`.
             *scripts: files that run one after the other, from the project's root.
            configs: for recipes that take `--model_name`, the prefix of their files in recipes/configs. With a GPU and no
                model name, `<prefix>_gsm8k.yaml` is used.
            arguments: further arguments of the first script.
            vllm: whether it trains with `--use_vllm` where there is a GPU and vLLM.
            trainer: public name of the trainer. Targets with a trainer are the rows of `latent-reasoning methods`.
            parent: the TRL trainer that it stands in for.
            paper: the arXiv id of the method's paper; empty: ours.
            what: what the method does, as in the README's table.
            evidence: what was measured, as in the README's table.
            data: "module:function" of what makes rows of a file usable, and its further arguments. It is called with the
                name of the dataset, its columns, and these arguments, and returns a function of a row's place and the
                row, which raises a ValueError for an unusable row. `latent-reasoning data check` uses it. If the module has
                `checked_rows(name, bad)`, that reads the file, else `trl_ext.tasks.files.read_rows`.
        """
        self.name, self.about, self.scripts = name, about, scripts
        self.configs, self.arguments, self.vllm = configs, arguments, vllm
        self.trainer, self.parent, self.paper = trainer, parent, paper
        self.what, self.evidence, self.data = what, evidence, data

    @property
    def trains(self) -> str:
        """The name that `latent-reasoning train` knows it by; empty if it does not train."""
        name = self.name.removeprefix("train-")
        return name if name != self.name or self.name == "minimind" else ""


@dataclass(frozen=True, kw_only=True)
class TrainingMethod:
    """The declaration of one method on the training side.

    Attributes:
        name: name of the folder. A method that attaches modules has the same name in `unsloth_ext`.
        about: its title, a colon, and one sentence that says what it does. The documentation's index shows both.
        trainers: the public names of its trainers, each with its configuration. Presets are in the configuration.
        exports: the public names of the method, each with the module that defines it.
        commands: its make targets.
        progress: metrics shown beside the progress bar, each with a short name.
        curves: metrics drawn at the end of a recipe, each with its title.
        gpu_check: the file in benchmarks/ with its cases for `make gpu-check`: `CASES`, and `train(folder, case,
            precision)`.
        gpu_check_needs_stock: whether its trainers refuse Unsloth's models. The GPU check then skips them under
            Unsloth.

    Raises:
        ValueError: a field is of the wrong kind, or a trainer is not public.
    """

    name: str
    about: str
    trainers: Mapping[str, str] = field(default_factory=dict)
    exports: Mapping[str, str] = field(default_factory=dict)
    commands: tuple[Command, ...] = ()
    progress: Mapping[str, str] = field(default_factory=dict)
    curves: tuple[tuple[str, str], ...] = ()
    gpu_check: str = ""
    gpu_check_needs_stock: bool = False

    def __post_init__(self) -> None:
        check_tuples(self, "commands", "curves")
        for name in (*self.trainers, *self.trainers.values()):
            if name not in self.exports:
                raise ValueError(f"{file_of(self)}: {name} is named in `trainers` and is not among the exports")


@functools.cache
def training_methods() -> dict[str, TrainingMethod]:
    """Every record of this package by the name of its method: one for each folder with a `method.py`."""
    return records(__package__.partition(".")[0])


def commands() -> dict[str, Command]:
    """The make targets of all methods by name.

    Raises:
        ValueError: two methods declare the same target.
    """
    found: dict[str, Command] = {}
    owners: dict[str, str] = {}
    for method in training_methods().values():
        for command in method.commands:
            if command.name in found:
                raise ValueError(f"{file_of(method)}: the target {command.name} is in {owners[command.name]} already")
            found[command.name], owners[command.name] = command, file_of(method)
    return found


def index_table() -> str:
    """The documentation's table of methods: those of this package, and those that have a model side only.

    Raises:
        ValueError: a record does not say what its method does in the form of a title and a sentence.
    """
    lines = ["| page | what it does |", "|---|---|"]
    methods: dict[str, Method | TrainingMethod] = {**all_methods(), **training_methods()}
    for name, method in methods.items():
        title, _, sentence = method.about.partition(": ")
        if not sentence:
            raise ValueError(
                f"{file_of(method)}: about={method.about!r}; write 'Title: a sentence that says what it does.'"
            )
        lines.append(f"| [{title}]({name}.md) | {sentence[0].upper()}{sentence[1:]} |")
    return "\n".join(lines)
