"""Preparation of rows in which the teacher reads another text than the student, such as longer reasoning."""

from collections.abc import Callable

from datasets import Dataset, concatenate_datasets


TEXTS = {
    "teacher_prompt": "prompt",
    "teacher_completion": "completion",
}  # the teacher's columns and the student's that they replace
SEGMENTS = ("prompt", "reasoning", "answer")
ROW = "_row"  # column for the row number during preparation


def prepare_both(dataset: Dataset, name: str, prepare: Callable[[Dataset, str], Dataset]) -> Dataset:
    """Prepare the student's and the teacher's text of each row.

    Args:
        dataset: has `prompt`, `completion`, and `teacher_prompt` or `teacher_completion` or both.
        name: name of the dataset, for messages.
        prepare: makes `input_ids` and `segment_ids` of a dataset; called with the dataset and its name. It may drop
            rows.

    Returns:
        The prepared student rows, with `teacher_input_ids` and `teacher_segment_ids`.

    Raises:
        ValueError: the dataset is iterable or tokenized, or a row's teacher text lacks a segment that the student's
            text has.
    """
    theirs = [column for column in TEXTS if column in (dataset.column_names or ())]
    if not isinstance(dataset, Dataset):
        raise ValueError(f"{name} dataset: {theirs[0]} cannot be used in an iterable dataset; load it as a whole")
    if "input_ids" in dataset.column_names:
        raise ValueError(
            f"{name} dataset: {theirs[0]} beside input_ids; rows that are tokenized need teacher_input_ids and "
            "teacher_segment_ids"
        )
    for column in theirs:
        if TEXTS[column] not in dataset.column_names:
            raise ValueError(f"{name} dataset: {column} without the student's {TEXTS[column]}")
    numbered = dataset.add_column(ROW, list(range(len(dataset))))
    ours = prepare(numbered.remove_columns(theirs), name)
    other = numbered.remove_columns([TEXTS[column] for column in theirs])
    other = prepare(other.rename_columns({column: TEXTS[column] for column in theirs}), f"{name} ({', '.join(theirs)})")
    place = {row: i for i, row in enumerate(other[ROW])}
    kept = [i for i, row in enumerate(ours[ROW]) if row in place]
    ours = ours.select(kept)
    other = other.select([place[row] for row in ours[ROW]])
    for row, student, teacher in zip(ours[ROW], ours["segment_ids"], other["segment_ids"], strict=True):
        lacks = sorted(set(student) - set(teacher))
        if lacks:
            raise ValueError(
                f"{name} dataset, row {row}: the teacher's text has no {SEGMENTS[lacks[0]]}, but the student's has one "
                "(max_length cuts both)"
            )
    other = other.select_columns(["input_ids", "segment_ids"])
    other = other.rename_columns({"input_ids": "teacher_input_ids", "segment_ids": "teacher_segment_ids"})
    return concatenate_datasets([ours.remove_columns(ROW), other], axis=1)
