"""Rows with question, steps and answer from a file or a hub dataset, and a report of unusable rows."""

import contextlib
import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from tqdm.auto import tqdm

from ..tasks.files import DataError, answer_text, number_in, read_rows
from .data import COLUMNS, LatentDataError


STEP = re.compile(r"<<[^<>]*>>")


@dataclass
class Rows:
    """The rows that were read from a dataset.

    Attributes:
        name: name of the dataset.
        usable: rows with `question`, `steps`, `answer` and, as `_where`, their place in the file.
        read: number of rows that were read.
        unusable: for each reason, the errors, which name their rows.
    """

    name: str
    usable: list[dict[str, Any]] = field(default_factory=list)
    read: int = 0
    unusable: dict[str, list[LatentDataError]] = field(default_factory=dict)

    def report(self) -> str:
        """How many rows are usable, and for each reason how many are not, with the first of them."""
        lines = [f"{self.name}: {len(self.usable):,} of {self.read:,} rows usable"]
        lines += [f"  {len(errors):,}: {reason} (first: {errors[0]})" for reason, errors in self.unusable.items()]
        return "\n".join(lines)

    def map(self, make: Callable[[dict, int, str], Any]) -> list:
        """`make(row, index, name)` of every usable row. Rows for which it raises a `LatentDataError` become unusable.

        Args:
            make: for example a `LatentTokenizer`.

        Raises:
            DataError: no row is left.
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
        """Record a `LatentDataError` raised inside the block."""
        try:
            yield
        except LatentDataError as error:
            self.unusable.setdefault(error.reason, []).append(error)

    def need_one(self) -> None:
        """Raise a DataError if no row is usable."""
        if not self.usable:
            raise DataError("; ".join(map(str.strip, self.report().splitlines())))


def load_rows(
    name: str, *, split: str = "train", config: str | None = None, size: int | None = None, need_steps: bool = True
) -> Rows:
    """Read the first `size` rows (or all) of a dataset in one of these formats:

    - columns `question`, `steps` (a list of texts), `answer`: used as they are;
    - columns `question`, `cot` (a text of `<<a*b=c>>` steps, or of sentences), `answer`: GSM8K-Aug and -NL on the hub;
    - columns `question`, `answer` (solution with `<<a*b=c>>` annotations, `####`, number): GSM8K; if no steps are needed,
      the answer may be the number alone;
    - column `text`, as of a `.txt` file: GSM8K-Aug lines `question||<<a*b=c>> <<..>> #### number`.

    Args:
        name: a `.jsonl`, `.json`, `.parquet` or `.txt` file, or a hub id.
        split: split of a hub dataset.
        config: configuration of a hub dataset.
        size: maximum number of rows; None: all.
        need_steps: if false, rows without steps are usable too, for evaluation.

    Raises:
        DataError: there is no such file, it has none of these formats, or no row is usable.
    """
    columns, found = read_rows(name, split=split, config=config, size=size)
    read = step_reader(name, columns, need_steps)
    rows = Rows(name)
    for place, row in tqdm(found, f"Reading {name}", delay=2):
        rows.read += 1
        where = f"dataset {name}, {place}"
        with rows.checking():
            rows.usable.append({**read(where, row), "_where": where})
    rows.need_one()
    return rows


def step_reader(
    name: str, columns: Collection[str], need_steps: bool = True
) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """What makes a question, its steps and its answer of a row: a function of the row's place and the row.

    The function raises a `LatentDataError` for a row that cannot be used.

    Args:
        name: name of the dataset.
        columns: its columns.
        need_steps: as for `load_rows`.

    Raises:
        DataError: the columns are of none of the formats.
    """
    shapes: tuple[tuple[set[str], Callable], ...] = (
        (set(COLUMNS), _row_of_columns),
        ({"question", "cot", "answer"}, _row_of_cot),
        ({"question", "answer"}, _row_of_answer),
        ({"text"}, _row_of_text),
    )
    make = next((make for needed, make in shapes if needed <= set(columns)), None)
    if make is None:
        wanted = "question and answer, with steps or cot, or text"
        raise DataError(f"dataset {name} has the columns {', '.join(columns)}, but it needs {wanted}")

    def read(where: str, row: dict[str, Any]) -> dict[str, Any]:
        if "answer" in row:
            row = {**row, "answer": answer_text(row["answer"])}
        return make(row, where, need_steps)

    return read


def row_of_aug(line: str, where: str, need_steps: bool = True) -> dict[str, Any]:
    """Parse a line of GSM8K-Aug or GSM8K-Aug-NL: `question||step step #### answer`. Steps are `<<a*b=c>>`, or
    sentences.

    Raises:
        LatentDataError: the line has no `||`, no `####`, no step, or no number after `####`.
    """
    question, found, rest = line.partition("||")
    if not found:
        raise LatentDataError(where, "no '||' between question and steps", line)
    return _row(question, rest, where, need_steps, annotations_only=False)


def row_of_gsm8k(row: dict[str, Any], where: str, need_steps: bool = True) -> dict[str, Any]:
    """Parse a row of GSM8K. The steps are the `<<a=b>>` annotations of its answer.

    Raises:
        LatentDataError: the answer has no annotation, no `####`, or no number after it.
    """
    _texts(row, ("question", "answer"), where)
    return _row(row["question"], row["answer"], where, need_steps, annotations_only=True)


def _row_of_cot(row: dict[str, Any], where: str, need_steps: bool) -> dict[str, Any]:
    _texts(row, ("question", "cot", "answer"), where)
    return _row(row["question"], f"{row['cot']} #### {row['answer']}", where, need_steps, annotations_only=False)


def _row_of_text(row: dict[str, Any], where: str, need_steps: bool) -> dict[str, Any]:
    _texts(row, ("text",), where)
    return row_of_aug(row["text"], where, need_steps)


def _row_of_answer(row: dict[str, Any], where: str, need_steps: bool) -> dict[str, Any]:
    """GSM8K's answer with its solution, or, if no steps are needed, the answer alone."""
    alone = not need_steps and "####" not in str(row.get("answer"))
    return (_row_of_columns if alone else row_of_gsm8k)(row, where, need_steps)


def _row_of_columns(row: dict[str, Any], where: str, need_steps: bool) -> dict[str, Any]:
    _texts(row, ("question", "answer"), where)
    for column in ("question", "answer"):
        if not row[column].strip():
            raise LatentDataError(where, f"{column} is empty", row[column])
    if number_in(row["answer"]) is None:
        raise LatentDataError(where, "not one number in the answer", row["answer"])
    steps = row.get("steps") or []
    if not isinstance(steps, list) or not all(isinstance(step, str) and step.strip() for step in steps):
        raise LatentDataError(where, "steps is not a list of texts", steps)
    if need_steps and not steps:
        raise LatentDataError(where, "no step", row.get("steps"))
    return {"question": row["question"], "steps": steps, "answer": row["answer"]}


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
    number = number_in(answer)
    if number is None:
        raise LatentDataError(where, "not one number after '####'", answer)
    steps = STEP.findall(working)
    if not steps and not annotations_only:
        steps = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n", working) if part.strip()]
    if not steps and need_steps:
        kind = "<<a*b=c>> step" if annotations_only else "step"
        raise LatentDataError(where, f"no {kind} before '####'", solution)
    return {
        "question": question.strip(),
        "steps": steps,
        "answer": number,
    }
