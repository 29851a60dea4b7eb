"""The answer after the delimiter, and its reward."""

import functools
from collections.abc import Callable

from math_verify import parse, verify


def completion_text(completion: str | list[dict]) -> str:
    """The text of a completion, conversational or not."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def final_answer(text: str, delimiter: str) -> str | None:
    """The text after the delimiter, stripped; None unless there is exactly one delimiter and text after it."""
    parts = text.split(delimiter)
    return parts[1].strip() or None if len(parts) == 2 else None


@functools.lru_cache(maxsize=100_000)
def same_number(gold: str, answer: str) -> bool:
    """Whether two answers are the same number. math-verify reads `1,000`, `$18`, `0.5` and `1/2`."""
    return gold == answer or verify(parse(gold), parse(answer))


def make_reward(delimiter: str) -> Callable[..., list[float]]:
    """The reward of HRPO (arXiv 2505.18454): 1.0 for the right number after exactly one delimiter, else 0.0.

    The function reads the column `answer` (a string); TRL passes dataset columns to reward functions.

    Raises:
        ValueError: the delimiter is empty.
    """
    if not delimiter:
        raise ValueError("the answer delimiter is empty: name the text before the answer, such as '####'")

    def correct_answer(completions: list, answer: list[str], **_) -> list[float]:
        found = [final_answer(completion_text(completion), delimiter) for completion in completions]
        return [float(text is not None and same_number(gold, text)) for gold, text in zip(answer, found, strict=True)]

    return correct_answer
