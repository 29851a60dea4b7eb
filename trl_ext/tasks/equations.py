"""Built-in equations with steps for latent chain of thought: `7*3+4-9=` is `7*3=1;1+4=5;5-9=6;`.

They are evaluated from left to right, modulo 10. A small model learns the table of each operation, but cannot chain
them in one pass. Two layers that write the steps are always right; without steps they are right one time in five.
"""

import random
from dataclasses import dataclass
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen2Config

from . import arithmetic


ANSWER_PROMPT = "#"
STEP_SEPARATOR = ";"
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Size:
    """Size of a task and of the model for it."""

    operations: int = 3
    rows: int = 40_000
    layers: int = 2
    width: int = 96
    heads: int = 4
    kv_heads: int = 4
    warm_start_steps: int = 1000


SMALL = Size()
LARGE = Size(operations=5, rows=100_000, layers=4, width=256, warm_start_steps=4000)  # benchmarks on a GPU
# A teacher and a student that differ in layers, heads and head dimension
TEACHER = Size(layers=3, width=108, heads=6, kv_heads=3, warm_start_steps=800)
STUDENT = Size(layers=2, width=64, heads=4, kv_heads=2)


def split(held_out: int, seed: int, size: Size | None = None) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(training, held-out) rows with `question`, `steps`, `answer`. No held-out question is in the training rows.

    Raises:
        ValueError: more than half of all equations would be held out.
    """
    size = size or SMALL
    most = 5 * (9 + 9 + 8) ** size.operations  # half of all: ten first values; + and - with 1 to 9, * with 2 to 9
    if not 1 <= held_out <= most:
        raise ValueError(f"{held_out} held-out equations of {size.operations} operations: choose 1 to {most:,}")
    rng = random.Random(seed)
    kept: dict[str, dict] = {}
    while len(kept) < held_out:
        row = equation(rng, size.operations)
        kept[row["question"]] = row
    train: list[dict] = []
    while len(train) < size.rows:
        row = equation(rng, size.operations)
        if row["question"] not in kept:
            train.append(row)
    return train, list(kept.values())


def equation(rng: random.Random, operations: int) -> dict[str, Any]:
    """One random equation as a row."""
    value = rng.randrange(10)
    question, steps = str(value), []
    for _ in range(operations):
        sign = rng.choice("+-*")
        term = rng.randrange(2 if sign == "*" else 1, 10)
        after = {"+": value + term, "-": value - term, "*": value * term}[sign] % 10
        question += f"{sign}{term}"
        steps.append(f"{value}{sign}{term}={after}")
        value = after
    return {"question": f"{question}=", "steps": steps, "answer": str(value)}


def explicit(rows: list[dict[str, Any]], steps: bool = True) -> Dataset:
    """Rows for plain SFT: `prompt`, `completion` (steps and answer, or only the answer), and `answer`."""
    working = ["".join(step + STEP_SEPARATOR for step in row["steps"]) if steps else "" for row in rows]
    return Dataset.from_dict(
        {
            "prompt": [row["question"] for row in rows],
            "completion": [f"{w}{ANSWER_PROMPT}{row['answer']}" for w, row in zip(working, rows, strict=True)],
            "answer": [row["answer"] for row in rows],
        }
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character."""
    return arithmetic.character_tokenizer("0123456789+-*=;#")


def config(tokenizer: PreTrainedTokenizerFast, size: Size | None = None) -> Qwen2Config:
    """The configuration of the tiny model."""
    size = size or SMALL
    return arithmetic.tiny_config(tokenizer, size.layers, size.width, size.heads, size.kv_heads)
