"""Rows as prompts and completions, with and without a chat template."""

import pytest
from datasets import Dataset

from tests import tiny
from trl_ext.tasks.completions import completions, plain


ROWS = [
    {"question": "2 and 3?", "answer": "5", "solution": "2+3=<<2+3=5>>5"},
    {"question": "4 and 4?", "answer": "8", "solution": "4+4=8"},
]


def test_texts():
    rows = completions(ROWS[:1], tiny.tokenizer(()), "##", examples=ROWS[1:])
    assert rows.to_list() == [
        {"prompt": "4 and 4?\n4+4=8\n## 8\n\n2 and 3?\n", "completion": "2+3=5\n## 5", "answer": "5"}
    ]


def test_conversations():
    tokenizer = tiny.tokenizer(())
    tokenizer.chat_template = "{{ messages }}"
    (row,) = completions(ROWS[:1], tokenizer, "##", examples=ROWS[1:])
    assert row["completion"] == [{"role": "assistant", "content": "2+3=5\n## 5"}]
    system, *shown = row["prompt"]
    assert system["role"] == "system" and "##" in system["content"]
    assert [turn["content"] for turn in shown] == ["4 and 4?", "4+4=8\n## 8", "2 and 3?"]


@pytest.mark.parametrize("first", ["<unk>", None])
def test_a_conversation_begins_with_one_special_token(first):
    """The template writes the tokenizer's first token, and tokenizing adds it to every text."""
    tokenizer = tiny.tokenizer(())
    tokenizer.bos_token = first
    tokenizer.chat_template = "{{ bos_token or '' }}{% for m in messages %}{{ m.role }} {{ m.content }};{% endfor %}"
    asked, said = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}
    rows = Dataset.from_list([{"prompt": [asked], "completion": [said], "answer": "2"}])
    assert list(plain(rows, tokenizer)) == [{"prompt": "user 1+1;", "completion": "assistant 2;", "answer": "2"}]


def test_rows_of_texts_stay_as_they_are():
    rows = Dataset.from_list([{"prompt": "<unk>1+1", "completion": "2", "answer": "2"}])
    assert plain(rows, tiny.tokenizer(())) is rows
