"""`latent-reasoning data check FILE --method METHOD`: the share of usable rows, and each unusable row by its line."""

import importlib
import re
from collections.abc import Sequence

from tqdm.auto import tqdm

from ..cli.command_line import CommandLine
from ..cli.console import PlainConsole
from ..cli.train import method_name, training_commands
from ..common.config_checks import at_least
from ..common.run_folder import PROGRAM
from .files import DataError, read_rows


def parser() -> CommandLine:
    """The parser of this command."""
    made = CommandLine(prog=f"{PROGRAM} data", description=__doc__)
    made.add_argument("what", choices=("check",), help="what to do with the data")
    made.add_argument("file", help="a .jsonl, .json, .parquet or .txt file, or a hub id")
    known = [name for name, command in training_commands().items() if command.data]
    made.add_argument("--method", required=True, type=method_name, choices=known, help="the method that is to read it")
    made.add_argument("--dataset_config", help="configuration of a hub dataset")
    made.add_argument("--split", default="train", help="split of a hub dataset")
    made.add_argument("--show", type=int, default=20, help="show at most this many unusable rows (default: 20)")
    return made


def unusable_rows(
    name: str, method: str, *, split: str = "train", config: str | None = None
) -> tuple[int, list[ValueError]]:
    """Read every row as the method's recipe would.

    Args:
        name: a `.jsonl`, `.json`, `.parquet` or `.txt` file, or a hub id.
        method: what `latent-reasoning train` calls the method.
        split: split of a hub dataset.
        config: configuration of a hub dataset.

    Returns:
        The number of rows, and an error for each unusable one, which names its line.

    Raises:
        DataError: the file cannot be read, or a column is missing.
    """
    reader, *options = training_commands()[method].data
    module, _, function = reader.partition(":")
    broken: list[DataError] = []
    method_side = importlib.import_module(module)
    if hasattr(method_side, "checked_rows"):
        columns, rows = method_side.checked_rows(name, broken)
    else:
        columns, rows = read_rows(name, split=split, config=config, bad=broken)
    errors: list[ValueError] = list(broken)
    if rows:
        read = getattr(method_side, function)(name, columns, *options)
        for place, row in tqdm(rows, f"Reading {name}", delay=2):
            try:
                read(f"dataset {name}, {place}", row)
            except ValueError as error:
                errors.append(error)
    return len(rows) + len(broken), sorted(errors, key=_line)


def _line(error: ValueError) -> int:
    found = re.search(r", (?:line|row) (\d+)", str(error))
    return int(found[1]) if found else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Print the share of usable rows and the unusable ones. Return 1 if there are any, else 0."""
    flags = parser().parse_args(argv)
    at_least(flags, show=0)
    count, errors = unusable_rows(flags.file, flags.method, split=flags.split, config=flags.dataset_config)
    console = PlainConsole()
    usable = count - len(errors)
    console.print(f"{flags.file}: {usable:,} of {count:,} rows usable for {flags.method} ({usable / count:.1%})")
    for error in errors[: flags.show]:
        console.print(f"  {str(error).removeprefix(f'dataset {flags.file}, ')}")
    if len(errors) > flags.show:
        console.print(f"  and {len(errors) - flags.show:,} more; --show {len(errors)} shows all")
    return int(bool(errors))
