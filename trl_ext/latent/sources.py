"""Rows (question, steps, answer) from GSM8K-Aug's lines and from GSM8K's own annotations."""

import re
from typing import Any

from .data import LatentDataError


STEP = re.compile(r"<<[^<>]*>>")
NUMBER = re.compile(r"-?\$?\d[\d,]*(?:\.\d+)?")


def row_of_aug(line: str, where: str) -> dict[str, Any]:
    """A line of GSM8K-Aug or GSM8K-Aug-NL: `question||step step #### answer`; steps are `<<a*b=c>>`, or sentences.

    Raises:
        LatentDataError: no `||`, no `####`, no step, or no number after `####`.
    """
    question, found, rest = line.partition("||")
    if not found:
        raise LatentDataError(f"{where}: no '||' between question and steps in {line[:80]!r}")
    return _row(question, rest, where, annotations_only=False)


def row_of_gsm8k(row: dict[str, Any], where: str) -> dict[str, Any]:
    """A row of GSM8K: the steps are the `<<a=b>>` annotations of its answer.

    Raises:
        LatentDataError: no annotation, no `####`, or no number after it.
    """
    for column in ("question", "answer"):
        if not isinstance(row.get(column), str):
            raise LatentDataError(f"{where}: {column} is {row.get(column)!r}, not a text")
    return _row(row["question"], row["answer"], where, annotations_only=True)


def _row(question: str, solution: str, where: str, annotations_only: bool) -> dict[str, Any]:
    working, found, answer = solution.rpartition("####")
    if not found:
        raise LatentDataError(f"{where}: no '####' before the answer in {solution[-80:]!r}")
    number = NUMBER.search(answer)
    if number is None:
        raise LatentDataError(f"{where}: no number after '####' in {answer[:80]!r}")
    steps = STEP.findall(working)
    if not steps and not annotations_only:
        steps = [part.strip() for part in re.split(r"(?<=[.!?])\s+|\n", working) if part.strip()]
    if not steps:
        raise LatentDataError(f"{where}: no step before '####' in {solution[:80]!r}")
    return {
        "question": question.strip(),
        "steps": steps,
        "answer": number[0].replace(",", "").replace("$", ""),
    }
