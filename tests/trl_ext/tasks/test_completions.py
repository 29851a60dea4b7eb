"""Rows as prompts and completions, with and without a chat template."""

from tests import tiny
from trl_ext.tasks.completions import completions


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
