"""What each of MiniMind's files becomes, that TRL takes it, and an error with file, line and field for each bad row."""

import json
import os

import pytest
from datasets import config as datasets_config
from trl.data_utils import extract_prompt, is_conversational

from trl_ext import load_minimind_data
from trl_ext.tasks.files import DataError
from unsloth_ext.minimind.tokenizer import train_tokenizer


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets_config, "HF_DATASETS_CACHE", tmp_path / "cache")


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text, **more):
    return {"role": "system", "content": text, **more}


def tool(text):
    return {"role": "tool", "content": text}


def talk(*turns):
    return {"conversations": list(turns)}


def load(tmp_path, kind, *rows):
    """Rows are written as JSON, texts as they are."""
    file = tmp_path / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    file.write_bytes("".join(line + "\n" for line in lines).encode("utf-8", "surrogatepass"))
    return load_minimind_data(file, kind)


TAGGED = "<think>\nA sum.\n</think>\n<answer>\n3\n</answer>"
SFT = [
    talk(user("1+2?"), assistant("3"), user(" 你好\n"), assistant("\u2028\x85 hi ")),
    talk(system("Be brief."), user("x"), assistant("y")),
]
GOOD = {
    "pretrain": (
        [{"text": "a"}, {"text": " b\u2028\x85c\n", "source": "web"}],
        [{"text": "a"}, {"text": " b\u2028\x85c\n"}],
    ),
    "sft": (SFT, [{"messages": row["conversations"]} for row in SFT]),
    "dpo": (
        [{"chosen": [user("q"), assistant("good")], "rejected": [user("q"), assistant("bad")]}],
        [{"prompt": [user("q")], "chosen": [assistant("good")], "rejected": [assistant("bad")]}],
    ),
    "rl": (
        [
            talk(user("a"), assistant("b"), user("c"), assistant("d")),
            talk(user("e"), assistant("")),
            talk(user("f"), {"role": "assistant"}),
        ],
        [
            {"prompt": [user("a"), assistant("b"), user("c")], "answer": "d"},
            {"prompt": [user("e")], "answer": ""},
            {"prompt": [user("f")], "answer": ""},
        ],
    ),
    "reason": ([talk(user("1+2?"), assistant(TAGGED))], [{"messages": [user("1+2?"), assistant(TAGGED)]}]),
}


@pytest.mark.parametrize("kind", GOOD)
def test_rows_become_trls_columns(tmp_path, kind):
    rows, wanted = GOOD[kind]
    data = load(tmp_path, kind, rows[0], "  ", *rows[1:])
    assert data.to_list() == wanted
    assert data.cache_files[0]["filename"].startswith(str(tmp_path))  # memory-mapped
    assert is_conversational(data[0]) == (kind != "pretrain")
    if kind == "dpo":
        assert data[0] == extract_prompt(rows[0])  # the prompt that TRL finds


def test_turns_without_roles_alternate(tmp_path):
    rows = [
        {"conversations": [{"content": text} for text in "abcd"]},
        talk(*({"role": None, "content": c} for c in "ef")),
    ]
    found = load(tmp_path, "sft", *rows)["messages"]
    assert found[0] == [user("a"), assistant("b"), user("c"), assistant("d")] and found[1] == [
        user("e"),
        assistant("f"),
    ]


CALLS = [{"name": "add", "arguments": {"x": "你", "y": [1, 2]}}, {"function": {"name": "f", "arguments": '{"z": 1}'}}]
WRITTEN = (
    '<tool_call>\n{"name": "add", "arguments": {"x": "你", "y": [1, 2]}}\n</tool_call>\n'
    '<tool_call>\n{"name": "f", "arguments": {"z": 1}}\n</tool_call>'
)


@pytest.mark.parametrize("as_text", [True, False])
def test_tools_calls_and_reasoning_become_content(tmp_path, as_text):
    """Published files hold JSON inside strings; lists do as well."""
    tools = [{"name": "add"}, {"name": "f"}]
    calls, tools = (json.dumps(x) if as_text else x for x in (CALLS, tools))
    row = talk(
        system("Help.", tools=tools, tool_calls=None),
        user("x", reasoning_content=None, tools=""),
        assistant("", tool_calls=calls),
        tool("1"),
        tool("2"),
        assistant("\nWait", reasoning_content="\nhm\n", tool_calls=calls),
        tool("3"),
        assistant("y", reasoning_content="hm", tool_calls="[]" if as_text else []),
    )
    (messages,) = load(tmp_path, "sft", row)["messages"]
    assert [m["role"] for m in messages] == [turn["role"] for turn in row["conversations"]]
    start, end = "Help.\n\n# Tools\n\nYou may call", '\n<tools>\n{"name": "add"}\n{"name": "f"}\n</tools>\n'
    assert messages[0]["content"].startswith(start) and end in messages[0]["content"]
    assert [m["content"] for m in messages[1:]] == [
        "x",
        WRITTEN,
        "1",
        "2",
        f"<think>\nhm\n</think>\n\nWait\n{WRITTEN}",
        "3",
        "<think>\nhm\n</think>\n\ny",
    ]
    (bare,) = load(tmp_path, "sft", talk(system("", functions=tools), user("x"), assistant("y")))["messages"]
    assert bare[0]["content"] == messages[0]["content"].removeprefix("Help.\n\n")


def test_our_template_renders_what_is_loaded(tmp_path):
    """Prompt and completion, tokenized apart by TRL's preference and RL trainers, are the whole conversation's tokens."""
    tokenizer = train_tokenizer(["some text"], 265)
    turns = [system("s"), user("q"), assistant(" a"), user("r\n"), assistant("\n\nz")]
    row = load(tmp_path, "dpo", {"chosen": turns, "rejected": [*turns[:-1], assistant("w")]})[0]
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    prompt = tokenizer.apply_chat_template(row["prompt"], add_generation_prompt=True, return_dict=False)
    rest = tokenizer.encode(row["chosen"][0]["content"] + "<|im_end|>\n")
    assert prompt + rest == whole


Q, A = user("q"), assistant("a")
BAD = {  # kind, bad row, what the error says of it behind the line, and behind "conversations" where it begins with "["
    "broken JSON": ("sft", '{"conversations": [', "not JSON: Expecting value at character 20"),
    "no UTF-8": ("pretrain", '{"text": "\ud800"}', "not UTF-8 .byte 0xed at position 11.; save the file as UTF-8"),
    "no object": ("sft", "[1, 2]", r"not a JSON object: \[1, 2\]"),
    "no text": ("pretrain", {"txt": "a"}, "text: is missing"),
    "text null": ("pretrain", {"text": None}, "text: is missing"),
    "text number": ("pretrain", {"text": 3}, "text: is not a text: 3"),
    "text empty": ("pretrain", {"text": " \n"}, "text: is empty"),
    "half a pair": ("pretrain", '{"text": "\\ud800"}', "not Unicode, half a surrogate pair"),
    "other format": ("sft", {"messages": []}, "conversations: is missing"),
    "no list": ("sft", {"conversations": "hi"}, "conversations: is not a list of turns: 'hi'"),
    "no turns": ("sft", talk(), "conversations: has no assistant turn"),
    "turn no object": ("sft", talk(Q, "a"), r"\[1\]: is not an object: 'a'"),
    "no assistant": ("sft", talk(Q), "conversations: has no assistant turn"),
    "assistant first": ("sft", talk(A), r"\[0\].role: assistant comes first; expected system"),
    "system, assistant": ("sft", talk(system("s"), A), r"\[1\].role: assistant after system"),
    "user twice": ("sft", talk(Q, Q, A), r"\[1\].role: user after user"),
    "assistant twice": ("sft", talk(Q, A, A), r"\[2\].role: assistant after assistant; expected user or tool"),
    "system late": ("sft", talk(Q, A, system("s")), r"\[2\].role: system after assistant"),
    "unknown role": ("sft", talk({"role": "human", "content": "q"}), r"\[0\].role: 'human' is not one of system"),
    "role number": ("sft", talk({"role": 1, "content": "q"}), r"\[0\].role: is not a text: 1"),
    "some roles": ("sft", talk(Q, {"content": "a"}), r"\[1\].role: is missing"),
    "no content": ("sft", talk(Q, {"role": "assistant"}), r"\[1\].content: is missing"),
    "content list": ("sft", talk(user(["q"]), A), r"\[0\].content: is not a text: \['q'\]"),
    "content empty": ("sft", talk(Q, assistant("")), r"\[1\].content: is empty"),
    "other field": ("sft", talk(Q, assistant("a", weight=0)), r"\[1\].weight: .* no such field"),
    "user's tools": ("sft", talk(user("q", tools="[{}]"), A), r"\[0\].tools: .*role user has no"),
    "tools broken": ("sft", talk(system("s", tools="[{"), Q, A), r"\[0\].tools: is not JSON"),
    "functions no list": ("sft", talk(system("s", functions={"a": 1}), Q), r"\[0\].functions: is not a list of obj"),
    "calls no objects": ("sft", talk(Q, assistant("a", tool_calls=["f"])), r"\[1\].tool_calls: is not a list of obj"),
    "call unnamed": ("sft", talk(Q, assistant("", tool_calls=[{}])), r"\[1\].tool_calls\[0\].name: is missing"),
    "call's function": (
        "sft",
        talk(Q, assistant("", tool_calls=[{"function": 1}])),
        r"\[1\].tool_calls\[0\].function: is not an object: 1",
    ),
    "call bare": (
        "sft",
        talk(Q, assistant("", tool_calls=[{"name": "f"}])),
        r"\[1\].tool_calls\[0\].arguments: is missing",
    ),
    "no calls": ("sft", talk(Q, assistant("", tool_calls="[]")), r"\[1\].content: is empty"),
    "thought number": (
        "sft",
        talk(Q, assistant("a", reasoning_content=1)),
        r"\[1\].reasoning_content: is not a text: 1",
    ),
    "no rejected": ("dpo", {"chosen": [Q, A]}, "rejected: is missing"),
    "same": ("dpo", {"chosen": [Q, A], "rejected": [Q, A]}, "rejected: is the same as chosen"),
    "other prompt": (
        "dpo",
        {"chosen": [Q, A], "rejected": [user("p"), assistant("b")]},
        "rejected: has another prompt",
    ),
    "other length": (
        "dpo",
        {"chosen": [Q, A], "rejected": [Q, assistant("b"), user("r"), assistant("c")]},
        "rejected: has another prompt",
    ),
    "chosen empty": (
        "dpo",
        {"chosen": [Q, assistant("")], "rejected": [Q, assistant("b")]},
        r"chosen\[1\].content: is empty",
    ),
    "rejected ends": (
        "dpo",
        {"chosen": [Q, A], "rejected": [Q, A, user("r")]},
        r"rejected\[2\].role: user comes last; expected assistant",
    ),
    "no reference": ("rl", talk(Q, A, user("r")), r"\[2\].role: user comes last"),
    "empty in the middle": ("rl", talk(Q, assistant(""), user("r"), assistant("")), r"\[1\].content: is"),
    "no tags": ("reason", talk(Q, A), r"\[1\].content: has <think> 0 times"),
    "tag open": ("reason", talk(Q, assistant(TAGGED[:-9])), r"\[1\].content: has </answer> 0 times"),
    "tag twice": ("reason", talk(Q, assistant("<think>" + TAGGED)), r"\[1\].content: has <think> 2 times, not once"),
    "tags' order": (
        "reason",
        talk(Q, assistant("<answer>3</answer><think>x</think>")),
        r"\[1\].content: its tags are not in",
    ),
    "second turn": ("reason", talk(Q, assistant(TAGGED), user("r"), A), r"\[3\].content: has <think> 0 times"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named(tmp_path, name):
    """Behind a good row and an empty line: the third line."""
    kind, row, message = BAD[name]
    message = f"conversations{message}" if message.startswith(r"\[") else message
    with pytest.raises(DataError, match=rf"^dataset .*rows\.jsonl, line 3(, |: ){message}"):
        load(tmp_path, kind, GOOD[kind][0][0], "", row)


@pytest.mark.parametrize(
    "content, message", [(None, "no such file"), ("", "the file is empty"), ("\n \n", "has no rows")]
)
def test_a_file_without_rows_is_named(tmp_path, content, message):
    file = tmp_path / "some.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(DataError, match=rf"some\.jsonl.* {message}"):
        load_minimind_data(file, "sft")


def test_no_such_kind(tmp_path):
    with pytest.raises(ValueError, match="kind='ppo': choose one of pretrain, sft, dpo, rl, reason"):
        load(tmp_path, "ppo", {"text": "a"})


def test_a_changed_file_is_read_anew_and_an_unchanged_one_is_not(tmp_path):
    first = load(tmp_path, "pretrain", {"text": "a"})
    assert load_minimind_data(tmp_path / "rows.jsonl", "pretrain").cache_files == first.cache_files
    stamp = (tmp_path / "rows.jsonl").stat()
    assert load(tmp_path, "pretrain", {"text": "ab"})["text"][:] == ["ab"]  # another size
    (tmp_path / "rows.jsonl").write_text('{"text": "b"}\n')
    os.utime(tmp_path / "rows.jsonl", ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert load_minimind_data(tmp_path / "rows.jsonl", "pretrain")["text"][:] == ["b"]  # another time
    with pytest.raises(DataError, match="conversations: is missing"):
        load_minimind_data(tmp_path / "rows.jsonl", "sft")  # another kind


def test_preferences_as_texts_train_the_answer_and_its_end_alone(tmp_path):
    """Through TRL's own preparation and collator; as messages it trains the newline behind, as the tutorial does."""
    from trl import DPOConfig, DPOTrainer

    from patches import fused_lm_head
    from tests.trl_ext.minimind import setups
    from trl_ext.minimind.data import as_texts

    file = tmp_path / "dpo.jsonl"
    sides = {"chosen": setups.turns("What is 7+5?", "7+5=12"), "rejected": setups.turns("What is 7+5?", "9")}
    file.write_text(json.dumps(sides) + "\n")
    rows, tokenizer = load_minimind_data(file, "dpo"), setups.tokenizer()
    fused_lm_head.ensure()

    def trained(rows):
        args = DPOConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False)
        trainer = DPOTrainer(setups.save(tmp_path / "model"), args=args, train_dataset=rows, processing_class=tokenizer)
        batch = next(iter(trainer.get_train_dataloader()))
        return [tokenizer.decode(ids[mask.bool()]) for ids, mask in zip(batch["input_ids"], batch["completion_mask"])]

    assert trained(as_texts(rows, tokenizer)) == ["7+5=12<|im_end|>", "9<|im_end|>"]
    assert trained(rows) == ["7+5=12<|im_end|>\n", "9<|im_end|>\n"]
