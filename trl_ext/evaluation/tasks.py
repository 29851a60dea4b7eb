"""Tasks for evaluation: the embedded ones, and GSM8K, GSM-Hard, SVAMP and MultiArith from the user's files.

| task         | columns of a row                                                                                |
|--------------|-------------------------------------------------------------------------------------------------|
| `gsm8k`      | `question`; `answer`, which ends in `#### number`                                               |
| `gsm_hard`   | `input`; `target`, a number                                                                     |
| `svamp`      | `Body` and `Question`, or `question_concat`; `Answer`, a number                                 |
| `multiarith` | `sQuestion` and `lSolutions` (a list of one number), or `question` and `final_ans`              |

These are the columns of the published files. A file is `.jsonl`, `.json` (a list, or one object per line) or `.parquet`;
a hub id works too. Each task also reads rows with `question` and `answer`, a number or a solution that ends in
`#### number`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from datasets import Dataset, DatasetDict
from trl.data_utils import apply_chat_template

from unsloth_ext.common.text_model import TextModel

from ..tasks import arithmetic, equations, facts, reachability
from ..tasks.data import chat_dataset, solved
from ..tasks.files import DataError, answer_text, number_in, read_rows
from ..tasks.reward import final_answer, same_number


EMBEDDED = {"hrpo": "sums", "latent": "equations", "concept": "facts", "planner": "sentences", "plain": "sums"}
ANSWER_PROMPT = "The answer is:"  # the default of latent distillation


@dataclass(frozen=True)
class EvaluationTask:
    """Questions with exact answers.

    Attributes:
        name: of the task.
        rows: each with `question`, `prompt`, the text that the model gets, and `answer`.
        marker: the text before the answer; empty: the whole text is the answer.
        numeric: whether answers are compared as numbers, else as texts.
        max_new_tokens: maximum number of tokens of an answer.
        goes_on: whether a model may go on with another question after its answer, as after solved examples without a chat
            template. What follows the line of the first marker is not read then.
    """

    name: str
    rows: list[dict[str, Any]]
    marker: str
    numeric: bool
    max_new_tokens: int
    goes_on: bool = False

    def answer_in(self, text: str) -> str | None:
        """The answer that a text gives; None if there is none."""
        if self.goes_on:
            before, marker, rest = text.partition(self.marker)
            text = before + marker + rest.strip().partition("\n")[0]
        found = final_answer(text, self.marker) if self.marker else text.strip()
        return found or None

    def is_right(self, text: str, answer: str) -> bool:
        """Whether a text gives the answer."""
        found = self.answer_in(text)
        return found is not None and self.is_same(answer, found)

    def is_same(self, answer: str, found: str) -> bool:
        """Whether two answers are the same number, or text."""
        return same_number(answer, found) if self.numeric else found == answer.strip()

    def for_lm_eval(self, samples: int, temperature: float) -> dict[str, Any]:
        """The task as lm-evaluation-harness takes it.

        Args:
            samples: number of texts for each row; more than one are sampled.
            temperature: of sampling.
        """
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        return {
            "task": self.name,
            "custom_dataset": lambda **_: DatasetDict(test=Dataset.from_list(self.rows)),
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": lambda row: row["prompt"],
            "doc_to_target": lambda row: row["answer"],
            "generation_kwargs": {
                "until": [],
                "max_gen_toks": self.max_new_tokens,
                **({"do_sample": False} if samples == 1 else sampling),
            },
            "repeats": samples,
            "process_results": lambda row, texts: {"accuracy": float(self.is_right(texts[0], row["answer"]))},
            "metric_list": [{"metric": "accuracy", "aggregation": "mean", "higher_is_better": True}],
        }


def _gsm8k(row: dict[str, Any]) -> tuple[Any, Any]:
    return row["question"], row["answer"]


def _gsm_hard(row: dict[str, Any]) -> tuple[Any, Any]:
    return row["input"], row["target"]


def _svamp(row: dict[str, Any]) -> tuple[Any, Any]:
    if "question_concat" in row:
        return row["question_concat"], row["Answer"]
    body, question = row["Body"], row["Question"]
    if not isinstance(body, str) or not isinstance(question, str):
        return None, row["Answer"]
    body = body.strip()
    return f"{body}{'' if not body or body.endswith(('.', '?', '!')) else '.'} {question}".strip(), row["Answer"]


def _multiarith(row: dict[str, Any]) -> tuple[Any, Any]:
    if "sQuestion" not in row:
        return row["question"], row["final_ans"]
    found = row["lSolutions"]
    return row["sQuestion"], found[0] if isinstance(found, list) and len(found) == 1 else found


READERS: dict[str, Callable[[dict[str, Any]], tuple[Any, Any]]] = {
    "gsm8k": _gsm8k,
    "gsm_hard": _gsm_hard,
    "svamp": _svamp,
    "multiarith": _multiarith,
}


HUB_CONFIGS = {"openai/gsm8k": "main"}  # hub data sets that have no default configuration


def read_questions(name: str, file: str, limit: int | None = None, split: str = "test") -> list[dict[str, str]]:
    """Rows with `question`, `answer` (a number as text) and `solution` of a published file.

    Args:
        name: `gsm8k`, `gsm_hard`, `svamp` or `multiarith`.
        file: a `.jsonl`, `.json` or `.parquet` file, or a hub id.
        limit: maximum number of rows; None: all.
        split: split of a hub dataset.

    Raises:
        DataError: the file cannot be read, or a row has not the columns of the task or no number. The message names it.
    """
    found = []
    for place, row in read_rows(file, split=split, config=HUB_CONFIGS.get(file), size=limit)[1]:
        where = f"{name}: dataset {file}, {place}"
        try:
            question, answer = READERS[name](row)
        except KeyError:
            if not {"question", "answer"} <= row.keys():
                raise DataError(
                    f"{where}: has the columns {', '.join(row)}, which are not those of {name} (docs/evaluation.md)"
                ) from None
            question, answer = row["question"], row["answer"]
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{where}: the question is empty or not a text: {question!r:.100}")
        text = answer_text(answer)
        solution, _, behind = text.rpartition("####") if isinstance(text, str) else ("", "", "")
        number = number_in(behind)
        if number is None:
            raise DataError(f"{where}: there is not exactly one number in the answer {answer!r:.100}")
        plain = format(Decimal(number), "f")  # math-verify does not read 1e-07
        plain = plain.rstrip("0").rstrip(".") if "." in plain else plain
        found.append({"question": question.strip(), "answer": plain, "solution": solution.strip()})
    return found


def embedded_task(
    name: str, held_out: int, seed: int, marker: str, opened: TextModel | None = None, system_prompt: str | None = None
) -> EvaluationTask:
    """An embedded task with the held-out rows of a recipe.

    Args:
        name: `sums` or `reachability` (HRPO), `equations` (latent tokens), `facts` (concept tokens) or `sentences`
            (planner).
        held_out: number of rows, as `--eval_size` of the training.
        seed: `--warm_start_seed` of the training.
        marker: the text before an answer of `sums`, `reachability` or `equations`.
        opened: the model. With a chat template, `sums` are asked as the questions of a file.
        system_prompt: as for `file_task`.
    """
    if name == "sums":
        pairs, new = [(row.prompt, str(row.answer)) for row in arithmetic.split_problems(held_out, seed)[1]], 36
    elif name == "reachability":
        pairs = [(row.prompt, row.answer) for row in reachability.split_problems(held_out, seed)[1]]
        new = reachability.MAX_NEW_TOKENS
    elif name == "equations":
        pairs = [(row["question"], row["answer"]) for row in equations.split(held_out, seed)[1]]
        new = equations.MAX_NEW_TOKENS
    elif name == "facts":
        pairs, new = [(row["prompt"], row["answer"]) for row in facts.split(held_out, seed)[1]], 64
    else:  # the planner reads the text that is to be written from its plan
        pairs, new = [(row["answer"], row["answer"]) for row in facts.sentences(held_out, seed, 1)[1]], 64
    rows = [{"question": prompt, "prompt": prompt, "answer": answer} for prompt, answer in pairs]
    if name == "sums" and opened is not None and opened.tokenizer.chat_template:
        for row, prompt in zip(rows, chat_prompts(rows, marker, (), system_prompt, opened), strict=True):
            row["prompt"] = prompt
    numeric = name in ("sums", "equations")
    return EvaluationTask(name, rows, marker if numeric or name == "reachability" else "", numeric, new)


def chat_prompts(
    rows: list[dict[str, Any]],
    marker: str,
    shown: Sequence[dict[str, Any]],
    system_prompt: str | None,
    opened: TextModel,
) -> list[str]:
    """Questions in the chat template of a model, with a system prompt and solved examples (see `chat_dataset`)."""
    chats = chat_dataset(rows, marker, shown, system_prompt)["prompt"]
    return [apply_chat_template({"prompt": chat}, opened.tokenizer)["prompt"] for chat in chats]


def file_task(
    name: str,
    file: str,
    opened: TextModel,
    trained: dict[str, Any],
    *,
    limit: int | None = None,
    examples: int = 0,
    max_new_tokens: int = 512,
    system_prompt: str | None = None,
) -> EvaluationTask:
    """A task of a user's file, with prompts as the training of this kind of model writes them.

    Args:
        name: `gsm8k`, `gsm_hard`, `svamp` or `multiarith`.
        file: its file.
        opened: the model, whose tokenizer may have a chat template.
        trained: the arguments of the training, see `trained_with`.
        limit: maximum number of rows; None: all.
        examples: so many of the first rows, solved, come before each question, and are not asked.
        max_new_tokens: maximum number of tokens of an answer.
        system_prompt: of models with a chat template; None: that of the HRPO recipe; empty: none.
    """
    rows = read_questions(name, file, None if limit is None else limit + examples)
    shown, asked = rows[:examples], rows[examples:]
    if not asked:
        raise DataError(f"{name}: dataset {file} has {len(rows)} rows, and num_fewshot={examples} leaves none to ask")
    if opened.kind == "latent":
        if examples:
            raise ValueError(f"num_fewshot={examples}: a latent model reads one question and answers it; leave it out")
        marker = str(trained.get("answer_prompt", ANSWER_PROMPT)).strip()
        prompts = [row["question"] for row in asked]
    elif opened.tokenizer.chat_template:
        marker = opened.delimiter
        prompts = chat_prompts(asked, marker, shown, system_prompt, opened)
    else:
        marker = opened.delimiter
        before = "".join(f"{row['question']}\n{solved(row, marker)}\n\n" for row in shown)
        prompts = [f"{before}{row['question']}\n" for row in asked]
    pairs = [
        {"question": row["question"], "prompt": prompt, "answer": row["answer"]}
        for prompt, row in zip(prompts, asked, strict=True)
    ]
    goes_on = opened.kind != "latent" and not opened.tokenizer.chat_template
    return EvaluationTask(name, pairs, marker, True, max_new_tokens, goes_on)
