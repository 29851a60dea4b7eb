"""Problems as prompts and completions: reasoning, delimiter, answer."""

import re

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..tasks.data import chat_dataset


def completions(rows: list[dict], tokenizer: PreTrainedTokenizerBase, delimiter: str) -> Dataset:
    """Columns `prompt`, `completion`, `answer` from rows with `question`, `solution`, `answer`: conversations where the
    tokenizer has a chat template, texts otherwise."""
    texts = [
        f"{re.sub(r'<<[^>]*>>', '', row['solution'])}\n{delimiter} {row['answer']}".lstrip() for row in rows
    ]  # without GSM8K's calculator marks
    if tokenizer.chat_template:
        prompts = chat_dataset(rows, delimiter)["prompt"]
        return Dataset.from_list(
            [
                {"prompt": prompt, "completion": [{"role": "assistant", "content": text}], "answer": row["answer"]}
                for prompt, text, row in zip(prompts, texts, rows, strict=True)
            ]
        )
    return Dataset.from_list(
        [
            {"prompt": f"{row['question']}\n", "completion": text, "answer": row["answer"]}
            for row, text in zip(rows, texts, strict=True)
        ]
    )
