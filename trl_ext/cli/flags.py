"""Choice of the configuration file that a recipe reads, before its flags are parsed.

This module imports nothing that must be imported after Unsloth.
"""

from pathlib import Path
from typing import Any

import yaml

from trl_ext.cli.command_line import CommandLine
from trl_ext.common.spelling import did_you_mean


TASKS = ("tiny", "reachability")  # embedded tasks: values of --dataset
NAMES = ("model_name", "model_name_or_path", "student")  # flags that name the model


def chosen(
    argv: list[str], folder: Path, method: str, embedded: tuple[str, ...], tasks: tuple[str, ...] = ()
) -> tuple[str, Path, list[str]]:
    """The model's name, the configuration file, and the other flags.

    The file is the one that `--config` names (`found_config`). Otherwise it is `folder/<method>_<task>.yaml` if
    `--dataset` names one of `tasks`, `folder/<method>_<model>.yaml` for an embedded model (without flags, the first of
    them), and `folder/<method>_gsm8k.yaml` for any other model.

    Args:
        argv: the command line.
        folder: folder of the configuration files.
        method: first part of their names.
        embedded: names of the embedded models.
        tasks: names of the embedded tasks that have a file of their own.
    """
    peek = CommandLine(add_help=False)
    peek.add_argument("--config", type=Path)
    given, others = peek.parse_known_args(argv)
    config = given.config and found_config(given.config, folder)
    peek.add_argument(*(f"--{key}" for key in NAMES), dest="model_name")
    peek.add_argument("--dataset")
    named = peek.parse_known_args(others)[0]
    name = named.model_name
    if name is None and config is not None:
        fields = read_config(config)
        name = next((fields[key] for key in NAMES if key in fields), None)
    name = embedded[0] if name is None else name
    of = named.dataset if named.dataset in tasks else name if name in embedded else "gsm8k"
    return name, config or folder / f"{method}_{of}.yaml", others


def found_config(config: Path, folder: Path) -> Path:
    """A configuration file, or the one of that name, without `.yaml`, among those that come with the recipes.

    Raises:
        ValueError: a name without an ending is neither.
    """
    shipped = {file.stem: file for file in sorted(folder.glob("*.yaml"))}
    if config.exists() or config.suffix or len(config.parts) > 1:
        return config
    if config.name not in shipped:
        raise ValueError(
            f"--config {config}: there is no such file, and no configuration of that name comes with the recipe"
            f"{did_you_mean(config.name, shipped)}"
        )
    return shipped[config.name]


def wants_vllm(config: Path, flags: list[str]) -> bool:
    """Whether the flags, or else the configuration file, set `use_vllm`."""
    peek = CommandLine(add_help=False)
    peek.add_argument("--use_vllm", nargs="?", const=True, default=read_config(config).get("use_vllm", False))
    return str(peek.parse_known_args(flags)[0].use_vllm).lower() in ("yes", "true", "t", "y", "1")


def chosen_preset(config: Path, flags: list[str]) -> str | None:
    """The preset that the flags name, or else the configuration file."""
    peek = CommandLine(add_help=False)
    peek.add_argument("--preset", default=read_config(config).get("preset"))
    return peek.parse_known_args(flags)[0].preset


class _Loader(yaml.SafeLoader):
    """A YAML loader that refuses repeated keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            name = str(key.value)
            if name in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: {name} is given twice")
            seen.add(name)
        return super().construct_mapping(node, deep)


def read_config(path: Path) -> dict[str, Any]:
    """The fields of a configuration file: YAML in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        ValueError: there is no such file, or it is not a YAML mapping.
    """
    if not path.is_file():
        raise ValueError(f"--config {path}: there is no such file")
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        if "\0" in text:
            raise ValueError("contains a zero byte, so it is not UTF-8; save the file as UTF-8")
        found = yaml.load(text, _Loader)
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ValueError(f"--config {path}, line {line}: not UTF-8; save the file as UTF-8") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"--config {path}: does not consist of `field: value` lines")
    return found
