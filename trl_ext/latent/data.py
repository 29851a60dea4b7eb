"""Tokenization and batches of latent distillation, from rows with question, steps and answer.

teacher:  question | steps without the last | answer prompt | answer | EOS student:  question | <bot> latents <eot>    |
answer prompt | answer | EOS
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from unsloth_ext.common.question_ids import question_ids


COLUMNS = ("question", "steps", "answer")
TOKENS = ("question_ids", "trace_ids", "prompt_ids", "answer_ids")
STEP_ENDS = "step_ends"  # further columns, where latent tokens belong to steps, and where they stand for results
RESULTS = "result_starts"


class LatentDataError(ValueError):
    """A row cannot be used. The message names the dataset, the row and the reason, and shows the value.

    Attributes:
        reason: the reason, in words that do not depend on the row.
    """

    def __init__(self, where: str, reason: str, found: Any):
        shown = repr(found)
        super().__init__(f"{where}: {reason}: {shown if len(shown) <= 100 else shown[:100] + '...'}")
        self.reason = reason


@dataclass(frozen=True)
class LatentTokenizer:
    """Tokenize one row.

    Attributes:
        tokenizer: the tokenizer.
        answer_prompt: text before each answer. L_CODI compares the token that predicts the answer's first token.
        step_separator: text after each step.
        drop_last_step: remove the last step from the teacher's trace, as it mostly repeats the answer.
        max_length: maximum number of tokens of question, trace and answer together; None: no limit.
        step_ends: also say where each step of the trace ends.
        results: also say where the result of each step begins, which stands after its last `=`.
    """

    tokenizer: PreTrainedTokenizerBase
    answer_prompt: str
    step_separator: str
    drop_last_step: bool
    max_length: int | None
    step_ends: bool = False
    results: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of a tokenized row."""
        return (*TOKENS, *((STEP_ENDS,) if self.step_ends else ()), *((RESULTS,) if self.results else ()))

    def __call__(self, row: dict[str, Any], index: int, dataset: str) -> dict[str, list[int]]:
        """The ids of each column of `TOKENS`. The answer ends with EOS. With `step_ends` and `results` also these columns:
        the number of tokens of the trace up to the end of each step, and up to its result.

        Raises:
            LatentDataError: a column is missing or of the wrong type, there is no answer, a step has no result, or the
                row is too long.
        """
        where = row.get("_where") or f"{dataset} dataset, row {index}"
        question, steps, answer = (row.get(column) for column in COLUMNS)
        if not isinstance(question, str) or not question.strip():
            raise LatentDataError(where, "question is not a text", question)
        if not isinstance(answer, str) or not answer.strip():
            raise LatentDataError(where, "answer is not a text", answer)
        if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
            raise LatentDataError(where, "steps is not a list of one text or more", steps)
        steps = steps[: len(steps) - self.drop_last_step]
        out = {
            "question_ids": question_ids(self.tokenizer, question),
            "trace_ids": self._ids("".join(step + self.step_separator for step in steps)),
            "prompt_ids": self._ids(self.answer_prompt),
            "answer_ids": [*self._ids(answer), self.tokenizer.eos_token_id],
        }
        length = sum(map(len, out.values()))
        if self.max_length is not None and length > self.max_length:
            reason = f"more tokens than max_length={self.max_length}; raise it, or leave the row out"
            raise LatentDataError(where, reason, length)
        if self.step_ends or self.results:
            texts = [step + self.step_separator for step in steps]
            ends = np.cumsum([len(text) for text in texts])
            lasts = self._last_characters("".join(texts))
        if self.step_ends:
            out[STEP_ENDS] = np.searchsorted(lasts, ends).tolist()
        if self.results:
            behind = [step.rpartition("=")[2].lstrip() if "=" in step else "" for step in steps]
            for step, result in zip(steps, behind, strict=True):
                if not result:
                    reason = "a step has no result after '='; choose other latent_ce_tokens"
                    raise LatentDataError(where, reason, step)
            lengths = [len(result) + len(self.step_separator) for result in behind]
            out[RESULTS] = np.searchsorted(lasts, ends - np.array(lengths, dtype=int)).tolist()
        return out

    def _last_characters(self, text: str) -> list[int]:
        """Where each token's last character stands, which says what the token belongs to: its first one may be the
        separator of the step before."""
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        return [max(end - 1, start) for start, end in offsets]

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []


@dataclass(frozen=True)
class LatentCollator:
    """Pad rows of `LatentTokenizer`: questions on the left, the rest on the right.

    Returns a batch of B rows (long; masks are 0 or 1):
        question_ids, question_mask (B, Q).
        teacher_ids, teacher_mask (B, S): trace, answer prompt, answer. trace_mask (B, S) marks the trace, answer_mask
            the rest. teacher_labels are -100 at pads. teacher_at (B): the position in them that predicts the first
            answer token (-1: the last token of the question).
        input_ids, attention_mask (B, A): <eot>, answer prompt, answer. labels are -100 at pads and <eot>. student_at
            (B).
        step_ends, result_starts (B, K): only if the rows have them: the number of trace tokens up to the end of each step,
            and up to its result; all of them where there are fewer than K steps.
    """

    pad_token_id: int
    eot_token_id: int

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        teacher = [r["trace_ids"] + r["prompt_ids"] + r["answer_ids"] for r in rows]
        student = [[self.eot_token_id, *r["prompt_ids"], *r["answer_ids"]] for r in rows]
        question_ids, question_mask = self._pad([r["question_ids"] for r in rows], left=True)
        teacher_ids, teacher_mask = self._pad(teacher)
        input_ids, attention_mask = self._pad(student)
        trace_length = torch.tensor([len(r["trace_ids"]) for r in rows])
        prompt_length = torch.tensor([len(r["prompt_ids"]) for r in rows])
        steps = {}
        for name in (STEP_ENDS, RESULTS):
            if name in rows[0]:
                most = max(len(r[name]) for r in rows)
                places = [r[name] + [len(r["trace_ids"])] * (most - len(r[name])) for r in rows]
                steps[name] = torch.tensor(places, dtype=torch.long).reshape(len(rows), most)
        trace_mask = (torch.arange(teacher_ids.shape[1]) < trace_length[:, None]).long()
        labels = input_ids.masked_fill(attention_mask == 0, -100)
        labels[:, 0] = -100
        return {
            "question_ids": question_ids,
            "question_mask": question_mask,
            "teacher_ids": teacher_ids,
            "teacher_mask": teacher_mask,
            "trace_mask": trace_mask,
            "answer_mask": teacher_mask - trace_mask,
            "teacher_labels": teacher_ids.masked_fill(teacher_mask == 0, -100),
            "teacher_at": trace_length + prompt_length - 1,
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
            "student_at": prompt_length,
            **steps,
        }

    def _pad(self, rows: list[list[int]], left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        width = max(map(len, rows))
        ids = torch.full((len(rows), width), self.pad_token_id)
        mask = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(width - len(row), width) if left else slice(len(row))
            ids[i, where], mask[i, where] = torch.tensor(row, dtype=torch.long), 1
        return ids, mask


def check_lengths(
    dataset: Dataset, name: str, positions: int, thought: Callable[[list[list[int]], np.ndarray], np.ndarray] | int
) -> None:
    """Raise a LatentDataError at the first tokenized row for which teacher or student needs too many positions.

    Args:
        dataset: tokenized rows.
        name: of the dataset.
        positions: the most that the model has.
        thought: the number of latent tokens; or a function from the ends of steps and the lengths of traces to the most
            tokens, latent and written, between question and answer.
    """
    lengths = {column: np.array([len(ids) for ids in dataset[column]]) for column in TOKENS}
    between = thought if isinstance(thought, int) else thought(dataset[STEP_ENDS], lengths["trace_ids"])
    both = lengths["question_ids"] + lengths["prompt_ids"] + lengths["answer_ids"]
    longest = both + np.maximum(lengths["trace_ids"], between + 2)  # <bot>, latent tokens, <eot>
    bad = np.flatnonzero(longest > positions)
    if len(bad):
        reason = f"more tokens, latent tokens included, than the model's {positions} positions"
        raise LatentDataError(f"{name} dataset, row {bad[0]}", reason, int(longest[bad[0]]))
