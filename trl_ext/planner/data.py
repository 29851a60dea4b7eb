"""From SFT's rows to the text that the planner reads and the text that the executor writes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.nn import functional as F
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


MODES = ("generate", "reconstruct")
SAMPLE_ID = "sample_id"
COLUMNS = ("plan_ids", "text_ids", "text_labels", SAMPLE_ID)
HASHED = (SAMPLE_ID, "plan_ids", "text_ids")  # columns whose hash identifies a dataset


@dataclass(frozen=True)
class RowSplitter:
    """Split tokenized rows into what the planner reads, `plan_ids`, and what the executor writes, `text_ids` and
    `text_labels`.

    Attributes:
        mode: `"generate"`: the prompt, and the rest; `"reconstruct"`: the whole row for both.
        eos_token_id: the end of a text. A text of only this token is empty.
        name: name of the dataset, for errors.
    """

    mode: str
    eos_token_id: int | None
    name: str

    def __call__(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """Split one row by its `labels`, or by Unsloth's `completion_mask`. Without either, every token is labelled.

        Raises:
            ValueError: there is nothing to read, or nothing to write.
        """
        ids = row["input_ids"]
        labels, mask = row.get("labels"), row.get("completion_mask") or [1] * len(ids)
        if labels is None:
            labels = [token if counts else -100 for token, counts in zip(ids, mask)]
        start = 0
        if self.mode == "generate":
            start = next((i for i, label in enumerate(labels) if label != -100), len(labels))
        read, text = (ids[:start], ids[start:]) if self.mode == "generate" else (ids, ids)
        where = f"{self.name} dataset, row {row[SAMPLE_ID]}"
        if not read and self.mode == "generate":
            raise ValueError(
                f"{where}: its labels leave no prompt for the planner; use rows with prompt and completion, or set "
                "mode='reconstruct'. With truncation_mode='keep_end', raise max_length"
            )
        if all(token == self.eos_token_id for token in text):
            raise ValueError(f"{where}: its text is empty; remove the row")
        return {"plan_ids": read, "text_ids": text, "text_labels": labels[start:] if start else text}


def prepare(
    dataset: Dataset | IterableDataset, splitter: RowSplitter, parents: Callable[[Any], Any]
) -> Dataset | IterableDataset:
    """Apply SFT's preparation and add the columns of `COLUMNS`.

    Rows keep their number. If the preparation loses it, as Unsloth's does, rows are numbered again.

    Args:
        dataset: the rows.
        splitter: splits each row.
        parents: SFT's preparation.

    Raises:
        ValueError: see `RowSplitter`; or no row is left.
    """
    if set(COLUMNS) <= set(dataset.column_names or ()):
        return parents(dataset)
    dataset = parents(dataset.map(lambda _, index: {SAMPLE_ID: index}, with_indices=True))
    if isinstance(dataset, Dataset) and not len(dataset):
        raise ValueError(f"{splitter.name} dataset: no row is left: every prompt fills max_length; raise it")
    if dataset.column_names is not None and SAMPLE_ID not in dataset.column_names:
        dataset = dataset.map(lambda _, index: {SAMPLE_ID: index}, with_indices=True)
    return dataset.map(splitter)


@dataclass(frozen=True)
class PlannerCollator:
    """Apply TRL's collator, which pads on the right, to both texts of a row.

    Returns a batch of B rows (long; masks are 0 or 1):
        plan_input_ids, plan_attention_mask (B, U): what the planner reads.
        input_ids, attention_mask (B, T): what the executor writes.
        labels (B, T + 1): -100, then one label per token. Shifted as for a causal LM, so the first token has a label
            too.
        sample_id (B,).
    """

    inner: DataCollatorForLanguageModeling

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        text = self.inner([{"input_ids": row["text_ids"], "labels": row["text_labels"]} for row in rows])
        read = self.inner([{"input_ids": row["plan_ids"]} for row in rows])
        return {
            "plan_input_ids": read["input_ids"],
            "plan_attention_mask": read["attention_mask"],
            "input_ids": text["input_ids"],
            "attention_mask": text["attention_mask"],
            "labels": F.pad(text["labels"], (1, 0), value=-100),
            SAMPLE_ID: torch.tensor([row[SAMPLE_ID] for row in rows]),
        }


def cut(batch: dict[str, torch.Tensor], length: int | None, mode: str) -> dict[str, torch.Tensor]:
    """Cut the texts of a batch to at most `length` tokens.

    In the mode "reconstruct" the planner reads the text itself, and its input is cut too.
    """
    if length is None:
        return batch
    ends = {"input_ids": length, "attention_mask": length, "labels": length + 1}
    if mode == "reconstruct":
        ends |= {"plan_input_ids": length, "plan_attention_mask": length}
    return {name: value[:, : ends[name]] if name in ends else value for name, value in batch.items()}
