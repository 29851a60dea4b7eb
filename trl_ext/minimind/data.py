"""MiniMind's published JSONL files as the columns that TRL's trainers read."""

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Value
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from transformers import PreTrainedTokenizerBase

from ..tasks.files import DataError, check_file, read_json_rows


TAGS = ("<think>", "</think>", "<answer>", "</answer>")
AFTER = {  # roles that may follow a role
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),  # several calls are answered one after the other
}
BESIDE = {
    "system": ("tools", "functions"),
    "assistant": ("reasoning_content", "tool_calls"),
}  # fields allowed besides role and content
TOOLS = (  # as Qwen's and MiniMind's chat templates present them
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with function "
    "signatures within <tools></tools> XML tags:\n<tools>\n{}\n</tools>\n\nFor each function call, return a json object "
    "with function name and arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n"
    '{{"name": <function-name>, "arguments": <args-json-object>}}\n</tool_call>'
)


def load_minimind_data(file: str | Path, kind: str) -> Dataset:
    """Read all rows of a file, checked and memory-mapped. A message has only `role` and `content`.

    The content of a line, and the columns made from it, by kind:

    - `pretrain`: `text`; column `text`
    - `sft`: `conversations`; column `messages`
    - `dpo`: `chosen` and `rejected`, which differ in the last turn; columns `prompt`, `chosen`, `rejected` (messages)
    - `rl`: `conversations` that end in a reference, which may be empty; columns `prompt` (messages), `answer` (text)
    - `reason`: `conversations` whose assistant turns have each of `TAGS` once, in order; column `messages`

    If no turn has a role, user and assistant alternate. Other fields of a message (`reasoning_content`, `tool_calls`,
    the system message's `tools` or `functions`) become part of its content, as MiniMind's chat template writes them.
    Other columns of a row are dropped. The file is read line by line, and only once: the result stays in the cache of
    `datasets` until the file changes.

    Args:
        file: a JSONL file.
        kind: one of the kinds above.

    Returns:
        A `datasets.Dataset` with the columns above.

    Raises:
        DataError: there is no such file, it has no rows, or a row is malformed. The message names file, line and field.
        ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r}: choose one of {', '.join(KINDS)}")
    check_file(str(file))
    # This module is part of the key, because it has checked what is in the cache
    read = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in (Path(file).resolve(), Path(__file__))]
    try:
        return Dataset.from_generator(
            _rows,
            features=KINDS[kind][1],
            gen_kwargs={"name": str(file), "kind": kind},
            fingerprint=Hasher.hash([kind, read]),
        )
    except DatasetGenerationError as error:
        if isinstance(error.__cause__, DataError):
            raise error.__cause__ from None
        raise


def checked_rows(name: str, bad: list[DataError]) -> tuple[tuple[str, ...], list[tuple[str, dict[str, Any]]]]:
    """The columns and rows of a file as `load_minimind_data` reads it: lines of JSON, whatever its name.

    Args:
        name: the file.
        bad: collects the errors of lines that are not JSON objects.
    """
    rows = list(read_json_rows(name, bad))
    return tuple(dict.fromkeys(column for _, row in rows for column in row)), rows


def row_reader(name: str, columns: Collection[str], kind: str) -> Callable[[str, dict[str, Any]], dict[str, Any]]:
    """What checks a row and makes its columns: a function of the row's place and the row.

    Args:
        name: name of the dataset. It and `columns` are not used: each row is looked at by itself.
        columns: its columns.
        kind: see `load_minimind_data`.
    """
    return lambda where, row: KINDS[kind][0](Place(where), row)


def as_texts(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Preferences as texts.

    DPO then trains an answer and the token that ends it. With messages it would also train what the template writes
    after it.
    """

    def texts(row: dict[str, Any]) -> dict[str, str]:
        prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        return {"prompt": prompt, **{side: row[side][0]["content"] for side in ("chosen", "rejected")}}

    return rows.map(texts, features=Features({name: Value("string") for name in rows.column_names}))


@dataclass(frozen=True)
class Place:
    """The file and line of a row, for errors."""

    where: str

    def error(self, field: str, problem: str) -> DataError:
        return DataError(f"{self.where}, {field}: {problem}")


def _rows(name: str, kind: str) -> Iterator[dict[str, Any]]:
    read = row_reader(name, (), kind)
    for place, row in read_json_rows(name):
        yield read(f"dataset {name}, {place}", row)


def _pretrain(place: Place, row: dict[str, Any]) -> dict[str, Any]:
    return {"text": _text(place, row, "text")}


def _sft(place: Place, row: dict[str, Any]) -> dict[str, Any]:
    return {"messages": _messages(place, row, "conversations")}


def _dpo(place: Place, row: dict[str, Any]) -> dict[str, Any]:
    chosen, rejected = (_messages(place, row, side, ends=True) for side in ("chosen", "rejected"))
    if chosen[:-1] != rejected[:-1]:
        raise place.error("rejected", "has another prompt than chosen; they may differ only in the last turn")
    if chosen == rejected:
        raise place.error("rejected", "is the same as chosen")
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _rl(place: Place, row: dict[str, Any]) -> dict[str, Any]:
    turns = _messages(place, row, "conversations", ends=True, may_be_empty=True)
    return {"prompt": turns[:-1], "answer": turns[-1]["content"]}


def _reason(place: Place, row: dict[str, Any]) -> dict[str, Any]:
    turns = _messages(place, row, "conversations")
    for i, turn in enumerate(turns):
        if turn["role"] != "assistant":
            continue
        at, text = f"conversations[{i}].content", turn["content"]
        for tag in TAGS:
            if text.count(tag) != 1:
                raise place.error(at, f"has {tag} {text.count(tag)} times, not once; kind='sft' does not ask for tags")
        if sorted(TAGS, key=text.index) != list(TAGS):
            raise place.error(at, f"its tags are not in the order {' '.join(TAGS)}")
    return {"messages": turns}


MESSAGES = [{"role": Value("string"), "content": Value("string")}]
KINDS: dict[str, tuple[Callable[[Place, dict[str, Any]], dict[str, Any]], Features]] = {
    "pretrain": (_pretrain, Features({"text": Value("string")})),
    "sft": (_sft, Features({"messages": MESSAGES})),
    "dpo": (_dpo, Features({"prompt": MESSAGES, "chosen": MESSAGES, "rejected": MESSAGES})),
    "rl": (_rl, Features({"prompt": MESSAGES, "answer": Value("string")})),
    "reason": (_reason, Features({"messages": MESSAGES})),
}


def _messages(
    place: Place, row: dict[str, Any], name: str, ends: bool = False, may_be_empty: bool = False
) -> list[dict[str, str]]:
    """The messages of a field. With `ends` the last turn must be the assistant's; it may be empty with `may_be_empty`."""
    turns = row.get(name)
    if turns is None:
        raise place.error(name, "is missing")
    if not isinstance(turns, list):
        raise place.error(name, f"is not a list of turns: {turns!r:.80}")
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise place.error(f"{name}[{i}]", f"is not an object: {turn!r:.80}")
    unnamed = all(turn.get("role") is None for turn in turns)
    found: list[dict[str, str]] = []
    for i, turn in enumerate(turns):
        at = f"{name}[{i}]."
        role = ("user", "assistant")[i % 2] if unnamed else _text(place, turn, "role", at)
        if role not in AFTER:
            raise place.error(f"{at}role", f"{role!r} is not one of {', '.join(filter(None, AFTER))}")
        before = found[-1]["role"] if found else None
        if role not in AFTER[before]:
            who = f"{role} after {before}" if found else f"{role} comes first"
            raise place.error(f"{at}role", f"{who}; expected {' or '.join(AFTER[before])}")
        for field, value in turn.items():
            if field not in ("role", "content", *BESIDE.get(role, ())) and value not in (None, "", []):
                raise place.error(at + field, f"a message with role {role} has no such field")
        content = _content(place, turn, role, at, may_be_empty and i == len(turns) - 1)
        found.append({"role": role, "content": content})
    if not any(message["role"] == "assistant" for message in found):
        raise place.error(name, "has no assistant turn")
    if ends and found[-1]["role"] != "assistant":
        raise place.error(f"{name}[{len(turns) - 1}].role", f"{found[-1]['role']} comes last; expected assistant")
    return found


def _content(place: Place, turn: dict[str, Any], role: str, at: str, may_be_empty: bool) -> str:
    beside = BESIDE.get(role, ())
    lists = {field: _objects(place, turn, field, at) for field in beside if field != "reasoning_content"}
    content = _text(place, turn, "content", at, may_be_empty or any(lists.values()))
    if role == "assistant":
        calls = [_call(place, call, f"{at}tool_calls[{i}].") for i, call in enumerate(lists["tool_calls"])]
        content = "\n".join([content] * bool(content) + calls)
        thought = _text(place, turn, "reasoning_content", at, may_be_empty=True).strip("\n")
        if thought:
            content = f"<think>\n{thought}\n</think>\n\n" + content.lstrip("\n")
    for tools in (lists.get(field) for field in BESIDE["system"]):
        if tools:
            content = "\n\n".join([content] * bool(content) + [TOOLS.format("\n".join(map(_json, tools)))])
    return content


def _text(place: Place, holder: dict[str, Any], name: str, at: str = "", may_be_empty: bool = False) -> str:
    """The text of a field; "" if it is missing and may be empty."""
    value = holder.get(name)
    if value is None and not may_be_empty:
        raise place.error(at + name, "is missing")
    value = "" if value is None else value
    if not isinstance(value, str):
        raise place.error(at + name, f"is not a text: {value!r:.80}")
    if not value.strip() and not may_be_empty:
        raise place.error(at + name, "is empty")
    return value


def _objects(place: Place, turn: dict[str, Any], field: str, at: str) -> list[dict[str, Any]]:
    """A list of objects, possibly as JSON inside a string; [] if there is none."""
    value = turn.get(field) or []
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise place.error(at + field, f"is not JSON: {error}") from error
    if not isinstance(value, list) or not all(isinstance(part, dict) for part in value):
        raise place.error(at + field, f"is not a list of objects: {value!r:.80}")
    return value


def _call(place: Place, call: dict[str, Any], at: str) -> str:
    call = call.get("function", call)
    if not isinstance(call, dict):
        raise place.error(f"{at}function", f"is not an object: {call!r:.80}")
    name, arguments = _text(place, call, "name", at), call.get("arguments")
    if arguments is None:
        raise place.error(f"{at}arguments", "is missing")
    written = arguments if isinstance(arguments, str) else _json(arguments)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {written}}}\n</tool_call>'


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
