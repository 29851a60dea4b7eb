"""The segment (prompt, reasoning or answer) of each token."""

from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from unsloth_ext.common.delimiter import DelimiterMatcher


logger = logging.get_logger(__name__)

PROMPT, REASONING, ANSWER, PADDING = 0, 1, 2, -1
TEACHER = "teacher_"


@dataclass(frozen=True)
class SegmentFinder:
    """Find the segments of tokenized rows.

    The prompt is everything before the first label. The reasoning ends with the token that completes the delimiter. The
    answer follows.
    """

    matcher: DelimiterMatcher

    def __call__(self, rows: dict[str, list]) -> dict[str, list]:
        """Compute the column `segment_ids` from `input_ids` and `labels` of a batch of rows."""
        starts = [next((i for i, x in enumerate(labels) if x != -100), len(labels)) for labels in rows["labels"]]
        completions = [torch.tensor(ids[start:]) for ids, start in zip(rows["input_ids"], starts, strict=True)]
        # The padding -1 indexes the last column of the table; results beyond the end of a row are ignored
        done = self.matcher.complete(pad_sequence(completions, batch_first=True, padding_value=-1))
        out = []
        for ids, start, complete in zip(rows["input_ids"], starts, done, strict=True):
            thought = complete[: len(ids) - start]
            end = len(ids) if not thought.any() else start + int(thought.int().argmax()) + 1
            out.append([PROMPT] * start + [REASONING] * (end - start) + [ANSWER] * (len(ids) - end))
        return {"segment_ids": out}


def add_segments(
    dataset: Dataset | IterableDataset, name: str, tokenizer: PreTrainedTokenizerBase, delimiter: str
) -> Dataset | IterableDataset:
    """Add the column `segment_ids`, unless the dataset has it. Rows without the delimiter are counted and reported.

    Raises:
        ValueError: no row has the delimiter, or a row's own `segment_ids` do not fit it.
    """
    if dataset.column_names is not None and "segment_ids" in dataset.column_names:
        return dataset.map(_check_row, with_indices=True, fn_kwargs={"name": name})
    finder = SegmentFinder(DelimiterMatcher(tokenizer, delimiter))
    dataset = dataset.map(finder, batched=True)
    if isinstance(dataset, Dataset):
        without = [i for i, ids in enumerate(dataset["segment_ids"]) if ids[-1] != ANSWER]
        if len(without) == len(dataset):
            raise ValueError(
                f"{name} dataset: no row has text after the delimiter {delimiter!r}; set answer_delimiter to what "
                "ends the reasoning in your completions, or raise max_length if that cuts them off before it"
            )
        if without:
            logger.warning(
                f"{name} dataset: {len(without):,} of {len(dataset):,} rows have no text after the delimiter "
                f"{delimiter!r} (first: row {without[0]}); their whole completions count as reasoning"
            )
    return dataset


def _check_row(row: dict[str, Any], index: int, name: str) -> dict[str, Any]:
    for whose in ("", TEACHER):
        ids, tokens = row.get(f"{whose}segment_ids"), row.get(f"{whose}input_ids")
        if whose and ids is None and tokens is None:
            continue
        if len(ids or ()) != len(tokens or ()) or not all(i in (PROMPT, REASONING, ANSWER) for i in ids or ()):
            raise ValueError(
                f"{name} dataset, row {index}: {whose}segment_ids must be {PROMPT}, {REASONING} or {ANSWER} for each of "
                f"the {len(tokens or ())} {whose}input_ids; found {len(ids or ())}"
            )
    return row


@dataclass(frozen=True)
class SegmentCollator:
    """Wrap a collator and add `segment_ids` (B, T) long, with -1 at padding.

    For rows with a teacher text it also adds `teacher_input_ids`, `teacher_attention_mask` and `teacher_segment_ids`,
    (B, T') long.
    """

    inner: Any

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        ours = [{k: v for k, v in row.items() if not k.startswith(TEACHER)} for row in rows]
        batch = self._one_text(ours)
        if f"{TEACHER}input_ids" in rows[0]:
            names = ("input_ids", "segment_ids")
            theirs = [{name: row[TEACHER + name] for name in names} for row in rows]
            other = self._one_text([{**row, "labels": row["input_ids"]} for row in theirs])
            batch |= {TEACHER + name: other[name] for name in (*names, "attention_mask")}
        return batch

    def _one_text(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        segments = [row["segment_ids"] for row in rows]
        batch = self.inner([{k: v for k, v in row.items() if k != "segment_ids"} for row in rows])
        mask = batch["attention_mask"].bool()
        ids = torch.full_like(batch["input_ids"], PADDING)
        ids[mask] = torch.tensor([i for row in segments for i in row])
        return {**batch, "segment_ids": ids}
