"""Reading of data files, and of the number in an answer."""

import itertools
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset, load_dataset


FORMATS = (".jsonl", ".json", ".parquet", ".txt")
NUMBER = re.compile(
    r"(?<![\w.,])-?\$?(?:(?:[0-9]{1,3}(?:,[0-9]{2,3})*,[0-9]{3}|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]+)?"
    r"(?!\w|[.,]\d)"
)
HALF_A_PAIR = re.compile(r"\\u[dD][89a-fA-F]")  # an escaped surrogate in JSON
OTHER_ENCODINGS = (b"\xff\xfe", b"\xfe\xff")  # byte order marks of UTF-16 and UTF-32


class DataError(ValueError):
    """A dataset cannot be used. The message names the file, the column or the row."""


def number_in(text: str) -> str | None:
    """The only number in an answer, without thousands separators and dollar sign: "18" of "$18.", "3.5" of "3.5 km".

    None if there is no number or more than one. `nan`, `1_000` and `3,5` are not numbers. A typographic minus is a
    minus.
    """
    found = NUMBER.findall(re.sub(r"^\s*-\s+", "-", text.replace("\u2212", "-")))
    return found[0].replace(",", "").replace("$", "") if len(found) == 1 else None


def answer_text(value: Any) -> Any:
    """A number in an answer column as text, 18 and 18.0 as "18". Other values, and NaN, are returned unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            return value
        value = int(value) if value.is_integer() else value
    return str(value)


def check_file(name: str) -> None:
    """Raise a DataError if there is no such file or it is empty."""
    if Path(name).is_dir():
        raise DataError(f"dataset {name} is a folder; name a file")
    if not Path(name).is_file():
        raise DataError(f"dataset {name}: there is no such file")
    if not Path(name).stat().st_size:
        raise DataError(f"dataset {name}: the file is empty")


def read_lines(name: str, bad: list[DataError] | None = None) -> Iterator[tuple[int, str]]:
    """The number, from 1, and the text of each line that is not blank.

    Only a newline ends a line, because other characters that Python treats as line ends may occur in a text. The byte
    order mark of UTF-8 is removed.

    Args:
        name: the file.
        bad: collects the errors of lines that are not UTF-8. None means that the first is raised.

    Raises:
        DataError: there is no such file, it is empty, or a line is not UTF-8.
    """
    check_file(name)
    with Path(name).open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number == 1:
                if line[:2] in OTHER_ENCODINGS or b"\0" in line:
                    raise DataError(f"dataset {name} is UTF-16, or another encoding with zero bytes; save it as UTF-8")
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                text = line.decode().rstrip("\r\n")
            except UnicodeDecodeError as error:
                said = (
                    f"not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1}); save the file as UTF-8"
                )
                _raise_or_keep(DataError(f"dataset {name}, line {number}: {said}"), bad)
                continue
            if text.strip():
                yield number, text


def read_json_rows(name: str, bad: list[DataError] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a `.jsonl` or `.json` file (one object per line, or a list of objects), each with its place, such as
    "line 3".

    Unlike in a table, columns may mix types.

    Args:
        name: the file.
        bad: collects the errors of lines that are not JSON objects. None means that the first is raised.

    Raises:
        DataError: there is no such file, it has no rows, or something in it is not a JSON object.
    """
    rows = 0
    for place, row in _json_values(name, bad):
        if not isinstance(row, dict):
            _raise_or_keep(DataError(f"dataset {name}, {place}: not a JSON object: {row!r:.100}"), bad)
            continue
        rows += 1
        yield place, row
    if not rows and not bad:
        raise DataError(f"dataset {name} has no rows")


def _raise_or_keep(error: DataError, bad: list[DataError] | None) -> None:
    if bad is None:
        raise error
    bad.append(error)


def _json_values(name: str, bad: list[DataError] | None) -> Iterator[tuple[str, Any]]:
    lines = read_lines(name, bad)
    first = next(lines, None)
    if first is None:
        return
    if Path(name).suffix == ".json" and first[1].lstrip().startswith("["):
        text = "\n".join([first[1], *(line for _, line in lines)])
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, and lists 100,000 deep
            raise DataError(f"dataset {name}: not JSON: {error}") from error
        for i, value in enumerate(values):
            yield f"row {i}", _encodable(text, value, f"dataset {name}, row {i}")
        return
    for number, line in itertools.chain([first], lines):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            one = ""
            if number == first[0] and line.lstrip().startswith("{") and not line.rstrip().endswith("}"):
                one = "; write each object on one line, or a list in a .json file between [ and ]"
            said = f"dataset {name}, line {number}: not JSON: {error.msg} at character {error.pos + 1}{one}"
            _raise_or_keep(DataError(said), bad)
            continue
        except (ValueError, RecursionError) as error:
            _raise_or_keep(DataError(f"dataset {name}, line {number}: cannot be read as JSON: {error}"), bad)
            continue
        try:
            yield f"line {number}", _encodable(line, value, f"dataset {name}, line {number}")
        except DataError as error:
            _raise_or_keep(error, bad)


def _encodable(text: str, value: Any, where: str) -> Any:
    """The value, which `text` holds.

    Raises:
        DataError: it has half a surrogate pair, which JSON can write but UTF-8 cannot.
    """
    if HALF_A_PAIR.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = error.object[max(error.start - 20, 0) : error.end]
            raise DataError(f"{where}: not Unicode, half a surrogate pair: {half!r}") from error
    return value


def read_table(name: str, *, split: str, config: str | None = None) -> Dataset:
    """Read a `.parquet` file or a hub dataset.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    path = Path(name)
    if path.suffix == ".parquet":
        check_file(name)
        try:
            if not pq.read_metadata(path).num_rows:  # datasets 4.8 would fail with "BatchSize must be greater than 0"
                return Dataset.from_dict({})
            return load_dataset("parquet", data_files=str(path), split="train")
        except Exception as error:
            raise DataError(f"dataset {name} cannot be read as .parquet: {error.__cause__ or error}") from error
    if not path.exists() and (path.is_absolute() or name.startswith((".", "~"))):
        raise DataError(f"dataset {name}: there is no such file or folder")
    if path.is_file() or path.suffix in (".csv", ".tsv"):
        raise DataError(f"dataset {name}: name a {', '.join(FORMATS)} file or a hub id")
    try:
        return load_dataset(name, config, split=split)
    except Exception as error:
        why = " ".join(str(error.__cause__ or error).split())
        elsewhere = isinstance(error, ConnectionError | FileNotFoundError) and not path.exists()
        here = f"there is no folder {name} in {os.getcwd()}, and the hub says: " if elsewhere else ""
        raise DataError(f"dataset {name}: {here}{why:.250}") from error  # some messages end with a whole schema


def read_rows(
    name: str,
    *,
    split: str,
    config: str | None = None,
    size: int | None = None,
    bad: list[DataError] | None = None,
) -> tuple[tuple[str, ...], list[tuple[str, dict[str, Any]]]]:
    """The columns, and the first `size` rows (or all), each with its place in the file ("line 3", "row 2").

    Args:
        name: a `.jsonl`, `.json`, `.parquet` or `.txt` file (its lines become the column `text`), or a hub id.
        split: split of a hub dataset.
        config: configuration of a hub dataset.
        size: maximum number of rows; None: all.
        bad: see `read_json_rows`.

    Raises:
        DataError: see `read_json_rows`, `read_lines` and `read_table`.
    """
    if not name:
        raise DataError("the dataset's name is empty: name a file or a hub id")
    suffix = Path(name).suffix
    if suffix in (".jsonl", ".json"):
        rows = list(read_json_rows(name, bad))[:size]
        return tuple(dict.fromkeys(column for _, row in rows for column in row)), rows
    if suffix == ".txt":
        columns, rows = ("text",), [(f"line {number}", {"text": line}) for number, line in read_lines(name, bad)][:size]
    else:
        table = read_table(name, split=split, config=config)
        table = table if size is None else table.select(range(min(size, len(table))))
        columns, rows = tuple(table.column_names), [(f"row {i}", row) for i, row in enumerate(table)]
    if not rows and not bad:
        raise DataError(f"dataset {name} has no rows")
    return columns, rows
