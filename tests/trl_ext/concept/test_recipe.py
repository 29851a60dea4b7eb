"""Rows as the recipes for concept tokens give them to the trainer."""

import pytest
from datasets import Dataset

from tests import tiny
from trl_ext.concept.recipe import plain


@pytest.mark.parametrize("first", ["<unk>", None])
def test_a_conversation_begins_with_one_special_token(first):
    """The template writes the tokenizer's first token, and tokenizing adds it to every text."""
    tokenizer = tiny.tokenizer(())
    tokenizer.bos_token = first
    tokenizer.chat_template = "{{ bos_token or '' }}{% for m in messages %}{{ m.role }} {{ m.content }};{% endfor %}"
    asked, said = {"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}
    rows = Dataset.from_list([{"prompt": [asked], "completion": [said], "answer": "2"}])
    assert list(plain(rows, tokenizer)) == [{"prompt": "user 1+1;", "completion": "assistant 2;", "answer": "2"}]


def test_texts_stay_as_they_are():
    rows = Dataset.from_list([{"prompt": "<unk>1+1", "completion": "2", "answer": "2"}])
    assert plain(rows, tiny.tokenizer(())) is rows
