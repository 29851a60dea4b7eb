"""Problems as prompts and completions: reasoning, delimiter, answer."""

from collections.abc import Sequence

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .data import chat_dataset, solved


def completions(
    rows: list[dict], tokenizer: PreTrainedTokenizerBase, delimiter: str, examples: Sequence[dict] = ()
) -> Dataset:
    """Columns `prompt`, `completion`, `answer` from rows with `question`, `solution`, `answer`, the solved examples before
    each question: conversations where the tokenizer has a chat template, texts otherwise."""
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
