"""Facts: distinct, of different people, held out ones never in training; and a tokenizer that gives texts back."""

import pytest

from trl_ext.tasks import facts


def test_halves_repeat_and_held_out_texts_are_new():
    train, held_out = facts.split(50, 3, facts.Size(rows=300))
    assert len(train) == 300 and len(held_out) == 50
    assert not set(train["prompt"]) & set(held_out["prompt"]) and len(set(train["prompt"])) == 300
    for row in held_out:
        assert row["completion"] == f" {row['prompt']}" == f" {row['answer']}"
        said = row["prompt"].split(" . ")
        assert len(said) == 6 and len({fact.split()[0] for fact in said}) == 6
    assert facts.split(50, 3, facts.Size(rows=300))[0]["prompt"] == train["prompt"]
    assert facts.split(50, 4, facts.Size(rows=300))[0]["prompt"] != train["prompt"]


@pytest.mark.parametrize("number", [1, 2])
def test_sentences_are_all_there_are_or_many(number):
    train, held_out = facts.sentences(100, 0, number)
    assert len(held_out) == 100 and len(train) == (16 * 8 * 12 - 100 if number == 1 else 20_000)
    assert not set(train["answer"]) & set(held_out["answer"])
    with pytest.raises(ValueError, match="eval_size=20000: there are 1536 facts"):
        facts.sentences(20_000, 0, 1)


def test_every_word_is_a_token_and_comes_back():
    tokenizer = facts.tokenizer()
    text = "Mia 8 apples . Paul 6 jars ."
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == 8 and tokenizer.decode(ids) == text and tokenizer.unk_token_id not in ids
    assert facts.config(tokenizer).vocab_size == len(tokenizer) == 41
