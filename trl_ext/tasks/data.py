"""Training and held-out rows from a hub dataset, a local file, or a reasoning-gym generator."""

import importlib.util
import json
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from datasets import Dataset

from ..cli.flags import TASKS
from .files import FORMATS, DataError, answer_text, number_in, read_rows


SYSTEM_PROMPT = (
    "Solve the problem step by step. Write your reasoning first; then, on a line of its own, write {delimiter} "
    "followed by the final number and nothing else."
)


HELD_OUT_SEED = 10**6  # added to a generator's seed, because it makes row i from seed + i


@dataclass
class DataArguments:
    """Where problems come from and how they are presented. Training and evaluation recipes must agree on it."""

    flags_title = "Model, data and evaluation"

    dataset: str = field(
        default="tiny",
        metadata={
            "help": "A hub id, a .jsonl or .parquet file with question and answer, or a reasoning-gym name; 'tiny' is "
            "the built-in task, and HRPO has 'reachability' too."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset ('main')."})
    dataset_options: dict | str | None = field(
        default=None, metadata={"help": "Options of a reasoning-gym generator, as JSON: '{\"max_terms\": 2}'."}
    )
    num_fewshot: int = field(
        default=0, metadata={"help": "Show this many of the first training problems, solved, in each prompt."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.dataset_options, str):
            try:
                self.dataset_options = json.loads(self.dataset_options)
            except json.JSONDecodeError as error:
                raise ValueError(f"dataset_options={self.dataset_options!r} is not JSON: {error}") from error
        if self.num_fewshot < 0 or (self.num_fewshot and self.dataset in TASKS):
            raise ValueError(f"num_fewshot={self.num_fewshot}: must be 0 or more, and 0 for the built-in tasks")
        if not isinstance(self.dataset_options or {}, dict):
            raise ValueError(f"dataset_options={self.dataset_options!r}: a JSON object, such as '{{\"max_terms\": 2}}'")
        if self.dataset_options and not is_generator(self.dataset):
            raise ValueError(
                f"dataset_options={self.dataset_options!r}: dataset={self.dataset} is not a reasoning-gym generator"
            )

    def rows(self, *, split: str, size: int | None, seed: int) -> list[dict]:
        """`load_rows` with these arguments."""
        options: Any = self.dataset_options or {}
        return load_rows(
            self.dataset,
            split=split,
            size=size,
            seed=seed,
            config=self.dataset_config,
            **options,
        )

    def split(
        self, *, train_size: int | None, eval_dataset: str | None, eval_size: int, seed: int
    ) -> tuple[list[dict], list[dict], list[dict]]:
        """Solved examples for each prompt, training rows and held-out rows. No question is in two of them.

        The held-out rows are the first `eval_size` rows of `eval_dataset`, or of the test split of a hub dataset or
        generator, or the last `eval_size` rows of a single file. Repeated questions are dropped from the training rows,
        so that the held-out rows do not depend on the training rows.

        Raises:
            DataError: too few rows are left in one of them.
        """
        local = Path(self.dataset).suffix in FORMATS  # a hub id may contain a dot too
        train = self.rows(split="train", size=None if local else train_size, seed=seed)
        examples, train = train[: self.num_fewshot], train[self.num_fewshot :]
        if eval_dataset or not local:
            name = eval_dataset or self.dataset
            source = replace(self, dataset=name, dataset_options=self.dataset_options if is_generator(name) else None)
            held_out = source.rows(split="test", size=eval_size, seed=seed + HELD_OUT_SEED)
        else:
            if len(train) <= eval_size:
                raise DataError(
                    f"dataset {self.dataset} has {len(train)} row(s) besides num_fewshot={self.num_fewshot}, and "
                    f"eval_size={eval_size} are held out: no row is left to train on; lower eval_size, or name an "
                    "eval_dataset"
                )
            train, held_out = train[:-eval_size], train[-eval_size:]
        unseen, new = without(held_out, examples), without(train, held_out)
        for name, before, left, others in (
            (eval_dataset or self.dataset, held_out, unseen, "shown in every prompt"),
            (self.dataset, train, new, "held out"),
        ):
            if not left:
                raise DataError(
                    f"dataset {name}: the questions of {len(before)} of its {len(before)} rows are {others} too, so no "
                    "row is left; remove the duplicates"
                )
        return examples, new[:train_size], unseen


def without(rows: list[dict], others: list[dict]) -> list[dict]:
    """The rows whose question is not among those of `others`."""
    seen = {row["question"] for row in others}
    return [row for row in rows if row["question"] not in seen]


def load_rows(
    name: str, *, split: str, size: int | None, seed: int, config: str | None = None, **options: Any
) -> list[dict]:
    """Rows with `question`, `answer` (only the number, as a string) and `solution` (the reasoning, if there is any).

    Args:
        name: a local `.jsonl`, `.json` or `.parquet` file with GSM8K's columns, the name of a reasoning-gym generator
            (`chain_sum`, `gsm_symbolic`, ...), or a hub id.
        split: split of a hub dataset; files and generators have none.
        size: maximum number of rows; for a generator, the number of rows to make.
        seed: seed of a generator.
        config: configuration of a hub dataset.
        options: options of a generator.

    Raises:
        DataError: there is no such file or column, there are no rows, or an answer has no number.
    """
    if is_generator(name):
        return _generated(name, size or 1000, seed, options)
    columns, rows = read_rows(name, split=split, config=config, size=size)
    read = problem_reader(name, columns)
    return [read(f"dataset {name}, {place}", row) for place, row in rows]


def problem_reader(name: str, columns: Collection[str]) -> Callable[[str, dict], dict]:
    """What makes a problem of a row: a function of the row's place and the row.

    Args:
        name: name of the dataset.
        columns: its columns.

    Raises:
        DataError: a column is missing.
    """
    for column in ("question", "answer"):
        if column not in columns:
            raise DataError(f"dataset {name} has no column {column!r}; it has {', '.join(columns)}")
    return _gsm8k_row


def is_generator(name: str) -> bool:
    """Whether reasoning-gym has a generator of this name."""
    if "/" in name or importlib.util.find_spec("reasoning_gym") is None:
        return False
    from reasoning_gym.factory import DATASETS

    return name in DATASETS


def _generated(name: str, size: int, seed: int, options: dict[str, Any]) -> list[dict]:
    import reasoning_gym

    made = reasoning_gym.create_dataset(name, size=size, seed=seed, **options)
    return [{"question": row["question"], "answer": str(row["answer"]), "solution": _working(row)} for row in made]


def _working(row: dict) -> str:
    expression = row["metadata"].get("expression")
    return f"{expression} = {row['answer']}" if expression else ""


def _gsm8k_row(where: str, row: dict) -> dict:
    question, answer = row.get("question"), answer_text(row.get("answer"))
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{where}: the question is empty or not a text: {question!r:.120}")
    if not isinstance(answer, str):
        raise DataError(f"{where}: the answer is neither a text nor a number: {answer!r:.120}")
    solution, _, behind = answer.rpartition("####")
    number = number_in(behind)
    if number is None:
        raise DataError(f"{where}: there is not exactly one number after '####' in the answer {answer!r:.120}")
    return {"question": question, "answer": number, "solution": solution.strip()}


def solved(row: dict, delimiter: str) -> str:
    """A row's reasoning without GSM8K's calculator annotations, then the delimiter and the answer."""
    working = re.sub(r"<<[^>]*>>", "", row["solution"])
    return f"{working}\n{delimiter} {row['answer']}".lstrip()


def chat_dataset(
    rows: list[dict], delimiter: str, examples: Sequence[dict] = (), system_prompt: str | None = None
) -> Dataset:
    """Conversational prompts: a system prompt, solved examples, and the question.

    Args:
        rows: the questions.
        delimiter: the text before an answer.
        examples: solved questions.
        system_prompt: None: one that asks for the delimiter; empty: none.
    """
    said = SYSTEM_PROMPT.format(delimiter=delimiter) if system_prompt is None else system_prompt
    shown = [{"role": "system", "content": said}] if said else []
    for row in examples:
        shown += [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": solved(row, delimiter)},
        ]
    return Dataset.from_list(
        [{"prompt": [*shown, {"role": "user", "content": row["question"]}], "answer": row["answer"]} for row in rows]
    )
