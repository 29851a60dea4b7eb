"""The flags of a recipe: every field of its dataclasses, with a configuration file below them.

This module imports TRL, so Unsloth must be imported before it.
"""

import argparse
import dataclasses
import inspect
import json
import os
import sys
import types
from argparse import ArgumentTypeError
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from transformers import TrainingArguments
from trl import TrlParser

from trl_ext.cli.command_line import CommandLine
from trl_ext.common.spelling import did_you_mean, underscored
from unsloth_ext.common.hub import check_name

from ..common.config_checks import check_values
from .aliases import flattened, renamed
from .flag_help import GENERAL, METAVARS, REST, USUAL, USUAL_TITLE, FlagsHelp, plain_type, title_of
from .flags import TASKS, read_config


# These settings of a configuration file apply only to its own dataset
OF_THE_DATASET = ("dataset_config", "dataset_options", "eval_dataset", "eval_dataset_config")
MADE_HERE = (*TASKS, "embedded")  # built-in datasets, which have their own held-out rows


class FlagsListed(SystemExit):
    """`--list_flags` was given.

    Attributes:
        parser: whose flags were listed.
    """

    def __init__(self, parser: "RecipeParser"):
        super().__init__(0)
        self.parser = parser


NO_BF16 = "doesn't support bf16/gpu"  # part of the message of transformers 5.17


class RecipeParser(CommandLine, TrlParser):
    """TRL's parser with full flag names in either spelling, other programs' names, and checked configuration files.

    `--help` shows our flags first; `--help_all` shows all.

    Args:
        dataclass_types: the dataclasses whose fields become flags.
        embedded: names of models that are neither folders nor on the hub.
        instead: values that replace those of a configuration file.

    Raises:
        ValueError: from `parse_args_and_config`, if a flag, a file, or a combination of fields is wrong.
    """

    def __init__(
        self, dataclass_types: Any, embedded: tuple[str, ...] = (), instead: dict[str, Any] | None = None, **kwargs: Any
    ):
        self.embedded, self.instead, self.config = embedded, instead or {}, None
        self.types: dict[str, Any] = {}
        self.groups: dict[str, Any] = {}  # by title
        self.everything = False
        about = (getattr(sys.modules["__main__"], "__doc__", None) or "").split("\n\n")[0]
        super().__init__(dataclass_types, description=about, add_help=False, formatter_class=FlagsHelp, **kwargs)
        general = self._group(GENERAL)
        general.add_argument("-h", "--help", action="help", help="Show the most used flags and their values, and exit.")
        general.add_argument(
            "--help_all",
            action=_HelpAll,
            nargs=0,
            default=argparse.SUPPRESS,
            help="Show all flags, including all of TRL and transformers.",
        )
        general.add_argument(
            "--config", metavar="FILE", default=argparse.SUPPRESS, help="A YAML file of fields; flags override it."
        )
        general.add_argument(
            "--check_flags",
            action="store_true",
            default=argparse.SUPPRESS,
            help="Check flags and configuration, and exit.",
        )
        general.add_argument(
            "--list_flags",
            action="store_true",
            default=argparse.SUPPRESS,
            help="List the names of all flags, and exit.",
        )
        general.add_argument(
            "--traceback",
            action="store_true",
            default=argparse.SUPPRESS,
            help="Show the traceback of errors that are otherwise one sentence.",
        )
        for action in self._actions:
            # `--a-b` is read as `--a_b`
            action.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
            if isinstance(action, argparse._StoreFalseAction):  # transformers' `--no_x`, beside `--x false`
                action.help = argparse.SUPPRESS
            elif action.choices:  # argparse would show all choices as one long word
                action.metavar = "NAME"
                action.help = f"{action.help or ''} One of: {', '.join(map(str, action.choices))}."
            elif action.dest in self.types:
                action.metavar = METAVARS.get(plain_type(self.types[action.dest]), "TEXT")

    def _add_dataclass_arguments(self, dtype: type) -> None:
        hints, declared = get_type_hints(dtype), {each.name: each for each in dataclasses.fields(dtype) if each.init}
        # The recipe's own fields come before the shared ones
        for name in dict.fromkeys(name for cls in dtype.__mro__ for name in inspect.get_annotations(cls)):
            if name in declared:
                self.types[name] = hints[name]
                field: Any = copy(declared[name])  # upstream narrows the type in place
                field.type = hints[name]
                title = title_of(dtype, name)
                if title == USUAL_TITLE:
                    field.metadata = {**field.metadata, "help": USUAL[name]}
                self._parse_dataclass_field(self._group(title), field)

    def _group(self, title: str) -> Any:
        if title not in self.groups:
            self.groups[title] = self.add_argument_group(title)
        return self.groups[title]

    def parse_args_and_config(self, args: Sequence[str] | None = None) -> tuple[Any, ...]:
        """One instance of each dataclass. Flags override the file that `--config` names."""
        given = sys.argv[1:] if args is None else args
        peek = CommandLine(add_help=False)
        peek.add_argument("--config", type=Path)
        peek.add_argument("--traceback", action="store_true")
        peek.add_argument("--check_flags", action="store_true")
        peek.add_argument("--list_flags", action="store_true")
        options, flags = peek.parse_known_args(self._our_names(given))
        if options.list_flags:
            print("\n".join(action.option_strings[-1] for action in self._actions if action.help != argparse.SUPPRESS))
            raise FlagsListed(self)
        if options.config:
            self.config = options.config
            peek.add_argument("--dataset")
            self._set_from(options.config, peek.parse_known_args(flags)[0].dataset)
        found = self.parse_args_into_dataclasses(args=flags, look_for_args_file=False)
        if options.check_flags:
            print(f"{self.prog}: flags and configuration are valid", flush=True)
            sys.exit(0)
        return found

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, others = super().parse_known_args(args, namespace)
        self.refuse(others)
        self._model_name = getattr(found, "model_name", None)  # kept here, because the namespace is emptied later
        check_values(found)
        for name in OF_THE_DATASET:
            if name in self.types and str(getattr(found, name)).lower() in ("none", "null"):
                setattr(found, name, None)
        if getattr(found, "eval_dataset", None) and found.dataset in MADE_HERE:
            raise ValueError(
                f"eval_dataset={found.eval_dataset}: dataset={found.dataset} has its own held-out rows, so this would not "
                "be read; name a file to train on with --dataset, or leave it out"
            )
        if getattr(found, "train_size", None) and found.dataset in TASKS:
            raise ValueError(
                f"train_size={found.train_size}: the {found.dataset} task makes its own rows and trains on all of them; "
                "leave it out, or name a file to train on with --dataset"
            )
        if "resume_from_checkpoint" in self.types:
            found.resume_from_checkpoint = _resume(found.resume_from_checkpoint)
        return found, others

    def parse_args_into_dataclasses(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        try:
            return super().parse_args_into_dataclasses(*args, **kwargs)
        except ValueError as error:
            if NO_BF16 not in str(error):
                raise
            way_out = ""
            if (
                self.embedded and self._model_name not in self.embedded
            ):  # a mistyped model name also leads to the GPU configuration
                check_name(self._model_name)  # type: ignore[arg-type]  # a recipe with `embedded` has the flag
                way_out = f", or --model_name {self.embedded[0]}, which is made for it"
            made_for = f" {self.config} does not say use_cpu: true;" if self.config else ""
            raise ValueError(
                f"bf16=True: no GPU here supports it;{made_for} to train on the CPU: --use_cpu true "
                f"--bf16 false{way_out}"
            ) from error

    def format_help(self) -> str:
        formatter = self._get_formatter()
        formatter.add_text(f"usage: {self.prog} [--config FILE] [--field value ...]")
        formatter.add_text(self.description)
        method = [title_of(dtype, None) for dtype in self.dataclass_types if issubclass(dtype, TrainingArguments)]
        rest = [title for title in self.groups if title.startswith(REST)]
        ours = [title for title in self.groups if title not in (*method, USUAL_TITLE, GENERAL, *rest)]
        for title in (*method, *ours, USUAL_TITLE, *(rest if self.everything else ()), GENERAL):
            if title in self.groups:
                formatter.start_section(title)
                actions = self.groups[title]._group_actions
                usual = title == USUAL_TITLE
                formatter.add_arguments(sorted(actions, key=lambda a: [*USUAL].index(a.dest)) if usual else actions)
                formatter.end_section()
        hidden = [action for title in rest for action in self.groups[title]._group_actions]
        more = sum(action.help is not argparse.SUPPRESS for action in hidden)
        if more and not self.everything:
            formatter.add_text(f"{more} more flags of TRL and transformers are shown by --help_all")
        return formatter.format_help()

    def _our_names(self, argv: Sequence[str]) -> list[str]:
        """Replace other programs' flags by ours."""
        words, found = underscored(argv), []
        while words:
            word = words.pop(0)
            name, equals, value = word[2:].partition("=")
            if not word.startswith("--") or word == "--" or f"--{name}" in self._option_string_actions:
                found.append(word)
                continue
            if not equals and words and not words[0].startswith("--"):
                value = words[0]
            try:
                ours, new = renamed(name, value or "true", self.types) or (name, value)
            except ValueError as error:
                raise ValueError(f"--{error}") from None
            if ours == name:
                self.refuse([word])
            if value and not equals:
                words.pop(0)
            found += [f"--{ours}", new] if value or new != "true" else [f"--{ours}"]
        return found

    def _set_from(self, file: Path, dataset: str | None) -> None:
        """Use the file's fields as defaults, after checking each against the type of its field."""
        fields = read_config(file)
        environment = fields.pop("env", {})  # as in TRL's parser
        if not isinstance(environment, dict):
            raise ValueError(f"{file}: env: {environment!r} is not a mapping of environment variables")
        os.environ.update({key: str(value) for key, value in environment.items()})
        try:
            named = self._option_string_actions  # includes other names of a field
            fields = {named[f"--{key}"].dest if f"--{key}" in named else key: value for key, value in fields.items()}
            fields = {k: v for k, v in flattened(fields, self.types).items() if k not in self.instead}
            for name in fields:
                if name not in self.types:
                    raise ValueError(f"{name}: there is no such field{did_you_mean(str(name), self.types)}")
            if dataset not in (None, fields.get("dataset")):
                left_out = {name: fields.pop(name) for name in OF_THE_DATASET if name in fields}
                if left_out and os.environ.get("RANK", "0") == "0":
                    said = ", ".join(f"{name}={value}" for name, value in left_out.items())
                    print(f"{file}: {said} ignored: --dataset {dataset} is not {fields.get('dataset')}", flush=True)
            if "resume_from_checkpoint" in fields:
                fields["resume_from_checkpoint"] = _resume(fields["resume_from_checkpoint"])
            actions = {action.dest: action for action in reversed(self._actions)}
            fields = {name: fitted(name, value, self.types[name], actions[name]) for name, value in fields.items()}
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        self.set_defaults_with_config(**fields, **self.instead)


class _HelpAll(argparse.Action):
    def __call__(self, parser: Any, *_: Any) -> None:
        parser.everything = True
        parser.print_help()
        parser.exit()


def fitted(name: str, value: Any, hint: Any, action: argparse.Action) -> Any:
    """A configuration file's value, converted to the type of its field.

    Args:
        name: name of the field.
        value: the value in the file.
        hint: the type of the field.
        action: the flag's action.

    Raises:
        ValueError: the value does not fit the type.
    """
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    plain = {get_origin(kind) or kind for kind in kinds}
    if value is None and type(None) in plain:
        return None
    if Any in plain or (type(value) in plain and not isinstance(value, list)):
        return _chosen(name, value, action)
    if isinstance(value, str) and not plain <= {list, type(None)}:
        return _chosen(name, _read(name, value, action.type, kinds), action)
    if isinstance(value, bool):
        pass
    elif isinstance(value, int) and float in plain:
        return float(value)
    elif isinstance(value, float) and int in plain and value.is_integer():
        return int(value)
    elif isinstance(value, int) and bool in plain and value in (0, 1):
        return bool(value)
    elif Literal in plain:
        return _chosen(name, value, action)
    if list in plain and value is not None:
        element = next((get_args(kind) for kind in kinds if get_origin(kind) is list), ()) or (Any,)
        return [fitted(name, each, element[0], action) for each in (value if isinstance(value, list) else [value])]
    raise ValueError(f"{name}: {_as_yaml(value)} is not {_in_words(kinds)}")


def _read(name: str, text: str, reader: Any, kinds: Sequence[Any]) -> Any:
    try:
        return reader(text) if reader else text
    except (ValueError, TypeError, ArgumentTypeError):
        raise ValueError(f"{name}: {text!r} is not {_in_words(kinds)}") from None


def _chosen(name: str, value: Any, action: argparse.Action) -> Any:
    if action.choices is not None and value not in action.choices:
        raise ValueError(f"{name}: {value!r}: choose one of {', '.join(map(str, action.choices))}")
    return value


def _in_words(kinds: Sequence[Any]) -> str:
    words = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text (in quotes)",
        dict: "a mapping",
    }
    words |= {list: "a list", type(None): "null"}
    return " or ".join(dict.fromkeys(words.get(get_origin(kind) or kind, "one of its choices") for kind in kinds))


def _as_yaml(value: Any) -> str:
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def _resume(value: Any) -> Any:
    """`resume_from_checkpoint` with transformers' "true" as our "latest"."""
    return {"true": "latest", "false": None}.get(str(value).lower(), value)
