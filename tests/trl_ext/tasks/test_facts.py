"""Facts: distinct, of different people, held out ones never in training; and a tokenizer that gives texts back."""

import re
from collections import Counter

import pytest

from trl_ext.tasks import facts


def test_halves_repeat_and_held_out_texts_are_new():
    train, held_out = facts.split(50, 3, facts.Size(rows=300))
    assert len(train) == 300 and len(held_out) == 50
    assert not set(train["prompt"]) & set(held_out["prompt"]) and len(set(train["prompt"])) == 300
    for row in held_out:
        assert row["completion"] == f" {row['prompt']}" == f" {row['answer']}"
        words = row["prompt"].split()
        assert len(words) == 4 * 4 + 16 and sum(word in facts.FILLERS for word in words) == 16
        said = [word for word in words if word not in facts.FILLERS]
        assert len(set(said[::4])) == 4 and set(said[::4]) <= set(facts.NAMES) and set(said[3::4]) == {"."}
        assert set(said[1::4]) <= set(facts.NUMBERS) and set(said[2::4]) <= set(facts.THINGS)
    assert facts.split(50, 3, facts.Size(rows=300))[0]["prompt"] == train["prompt"]
    assert facts.split(50, 4, facts.Size(rows=300))[0]["prompt"] != train["prompt"]


def test_words_between_facts_come_in_order_and_every_split_is_as_likely():
    found = facts.texts(4000, 0, 2, fillers=3)
    splits = Counter()
    for text in found:
        before = [part.split() for part in re.split(r"[A-Z]\w+ \d \w+ \.", text)]
        assert len(before) == 3 and all(words == facts.FILLERS[: len(words)] for words in before)
        splits[tuple(map(len, before))] += 1
    # 10 splits of 3 words into 3 places, 400 of each: six standard deviations
    assert len(splits) == 10 and all(abs(count - 400) < 6 * 19 for count in splits.values())


@pytest.mark.parametrize("number", [1, 2])
def test_sentences_are_all_there_are_or_many(number):
    train, held_out = facts.sentences(100, 0, number)
    assert len(held_out) == 100 and len(train) == (16 * 8 * 12 - 100 if number == 1 else 20_000)
    assert not set(train["answer"]) & set(held_out["answer"])
    with pytest.raises(ValueError, match="eval_size=20000: there are only 1536 facts"):
        facts.sentences(20_000, 0, 1)


def test_every_word_is_a_token_and_comes_back():
    tokenizer = facts.tokenizer()
    text = "Mia 8 apples . Paul 6 jars ."
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 8 and tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert facts.config(tokenizer).vocab_size == len(tokenizer) == 45
