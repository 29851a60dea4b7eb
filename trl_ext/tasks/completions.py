"""Problems as prompts and completions: reasoning, delimiter, answer."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import apply_chat_template, is_conversational

from .data import chat_dataset, solved


def completions(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, delimiter: str, examples: Sequence[dict] = ()
) -> Dataset:
    """Columns `prompt`, `completion`, `answer` from rows with `question`, `solution`, `answer`.

    They are conversations if the tokenizer has a chat template, texts otherwise.

    Args:
        rows: the problems.
        tokenizer: the tokenizer.
        delimiter: the text before the answer.
        examples: solved problems that come before each question.
    """
    ends: list = [solved(row, delimiter) for row in rows]
    if tokenizer.chat_template:
        prompts = chat_dataset(rows, delimiter, examples)["prompt"]
        ends = [[{"role": "assistant", "content": text}] for text in ends]
    else:
        shown = "".join(f"{row['question']}\n{solved(row, delimiter)}\n\n" for row in examples)
        prompts = [f"{shown}{row['question']}\n" for row in rows]
    return Dataset.from_list(
        [
            {"prompt": prompt, "completion": end, "answer": row["answer"]}
            for prompt, end, row in zip(prompts, ends, rows, strict=True)
        ]
    )


def plain(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Conversations as texts, without the special token that the tokenizer puts before each text."""
    if not is_conversational(rows[0]):
        return rows
    bos = tokenizer.bos_token or ""

    def text(row: dict[str, Any]) -> dict[str, str]:
        made = apply_chat_template({name: row[name] for name in ("prompt", "completion")}, tokenizer)
        return {**made, "prompt": made["prompt"].removeprefix(bos)}

    return rows.map(text)
