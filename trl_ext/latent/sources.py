"""Rows (question, steps, answer) from a file or a hub dataset, and an account of those that cannot be used."""

import contextlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from ..tasks.data import DataError, read_table
from .data import COLUMNS, LatentDataError


STEP = re.compile(r"<<[^<>]*>>")
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


@dataclass
class Rows:
    """What was read of a dataset.

    Attributes:
        name: of the dataset.
        usable: rows with `question`, `steps`, `answer`.
        read: how many rows were looked at.
        unusable: of each reason the errors, which name their rows.
    """

    name: str
    usable: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    unusable: dict[str, list[LatentDataError]] = field(default_factory=dict)

    def report(self) -> str:
        """How many rows are usable, and of each reason why not how many and the first."""
        lines = [f"{self.name}: {len(self.usable):,} of {self.read:,} rows usable"]
        lines += [f"  {len(errors):,}: {reason} (first: {errors[0]})" for reason, errors in self.unusable.items()]
        return "\n".join(lines)

    def map(self, make: Callable[[dict, int, str], Any]) -> list:
        """`make(row, index, name)` of every usable row, such as a `LatentTokenizer`. Rows for which it raises a
        `LatentDataError` are put aside.

        Raises:
            DataError: none is left.
        """
        rows, self.usable, made = self.usable, [], []
        for index, row in enumerate(tqdm(rows, f"Preparing {self.name}", delay=2)):
            with self.checking():
                made.append(make(row, index, self.name))
                self.usable.append(row)
        self.need_one()
        return made

    @contextlib.contextmanager
    def checking(self) -> Iterator[None]:
        """Counts a `LatentDataError` raised inside."""
        try:
            yield
        except LatentDataError as error:
            self.unusable.setdefault(error.reason, []).append(error)

    def need_one(self) -> None:
        """Raises a DataError if nothing is usable."""
        if not self.usable:
            raise DataError(self.report())


def load_rows(
    name: str, *, split: str = "train", config: str | None = None, size: int | None = None, need_steps: bool = True
) -> Rows:
    """The first `size` rows (all without it) of a dataset in one of these shapes.

    - columns `question`, `steps` (a list of texts), `answer`: taken as they are;
    - columns `question`, `cot` (a text of `<<a*b=c>>` steps, or of sentences), `answer`: GSM8K-Aug and -NL on the hub;
    - columns `question`, `answer` (working with `<<a*b=c>>` annotations, `####`, number): GSM8K;
    - column `text`, as of a `.txt` file: GSM8K-Aug lines `question||<<a*b=c>> <<..>> #### number`.

    Args:
        name: a `.jsonl`, `.json`, `.parquet` or `.txt` file, or a hub id.
        split, config: of a hub dataset.
        need_steps: without it a row that has no step is usable too, for evaluation.

    Raises:
        DataError: no such file, none of these shapes, or not one usable row.
    """
    table = read_table(name, split=split, config=config)
    columns = set(table.column_names)
    shapes: tuple[tuple[set[str], Callable], ...] = (
        (set(COLUMNS), _row_of_columns),
        ({"question", "cot", "answer"}, _row_of_cot),
        ({"question", "answer"}, row_of_gsm8k),
        ({"text"}, lambda row, *how: row_of_aug(row["text"], *how)),
    )
    make = next((make for needed, make in shapes if needed <= columns), None)
    if make is None:
        wanted = "question and answer, with steps or cot, or text"
        raise DataError(f"dataset {name} has the columns {', '.join(table.column_names)}; it needs {wanted}")
    if size is not None:
        table = table.select(range(min(size, len(table))))
    place = (lambda i: f"line {i + 1}") if make is shapes[-1][1] else (lambda i: f"row {i}")
    return rows_of(name, table, lambda row, i: make(row, f"dataset {name}, {place(i)}", need_steps))


def rows_of(name: str, source: Sequence, make: Callable[[Any, int], dict]) -> Rows:
    """`make(entry, index)` of every entry of `source`.

    Raises:
        DataError: not one is usable.
    """
    rows = Rows(name, read=len(source))
    for index, entry in enumerate(tqdm(source, f"Reading {name}", delay=2)):
        with rows.checking():
            rows.usable.append(make(entry, index))
    rows.need_one()
    return rows


def row_of_aug(line: str, where: str, need_steps: bool = True) -> dict[str, Any]:
    """A line of GSM8K-Aug or GSM8K-Aug-NL: `question||step step #### answer`; steps are `<<a*b=c>>`, or sentences.

    Raises:
        LatentDataError: no `||`, no `####`, no step, or no number after `####`.
    """
    question, found, rest = line.partition("||")
    if not found:
        raise LatentDataError(where, "no '||' between question and steps", line)
    return _row(question, rest, where, need_steps, annotations_only=False)


def row_of_gsm8k(row: dict[str, Any], where: str, need_steps: bool = True) -> dict[str, Any]:
    """A row of GSM8K: the steps are the `<<a=b>>` annotations of its answer.

    Raises:
        LatentDataError: no annotation, no `####`, or no number after it.
    """
    _texts(row, ("question", "answer"), where)
    return _row(row["question"], row["answer"], where, need_steps, annotations_only=True)


def _row_of_cot(row: dict[str, Any], where: str, need_steps: bool) -> dict[str, Any]:
    _texts(row, ("question", "cot", "answer"), where)
    return _row(row["question"], f"{row['cot']} #### {row['answer']}", where, need_steps, annotations_only=False)


def _row_of_columns(row: dict[str, Any], where: str, need_steps: bool) -> dict[str, Any]:
    _texts(row, ("question", "answer"), where)
    if need_steps and not (isinstance(row["steps"], list) and row["steps"]):
        raise LatentDataError(where, "no step", row["steps"])
    return {column: row[column] for column in COLUMNS}


def _texts(row: dict[str, Any], columns: tuple[str, ...], where: str) -> None:
    for column in columns:
        if not isinstance(row.get(column), str):
            raise LatentDataError(where, f"{column} is not a text", row.get(column))


def _row(question: str, solution: str, where: str, need_steps: bool, annotations_only: bool) -> dict[str, Any]:
    working, found, answer = solution.rpartition("####")
    if not found:
        raise LatentDataError(where, "no '####' before the answer", solution)
    if not question.strip():
        raise LatentDataError(where, "question is empty", question)
    number = NUMBER.search(answer)
    if number is None:
        raise LatentDataError(where, "no number after '####'", answer)
    steps = STEP.findall(working)
    if not steps and not annotations_only:
        steps = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n", working) if part.strip()]
    if not steps and need_steps:
        raise LatentDataError(where, "no step before '####'", solution)
    return {
        "question": question.strip(),
        "steps": steps,
        "answer": number[0].replace(",", "").replace("$", ""),
    }
