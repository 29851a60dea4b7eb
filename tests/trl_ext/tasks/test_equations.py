"""Steps follow from the question, held-out questions are held out, and the same seed makes the same rows."""

import re

from trl_ext.tasks import equations


def test_steps_are_the_question_worked_out():
    train, held_out = equations.split(200, 0)
    for row in [*train[:2000], *held_out]:
        first, *rest = re.findall(r"[+*-]?\d", row["question"].removesuffix("="))
        value = int(first)
        for term, step in zip(rest, row["steps"], strict=True):
            result = eval(f"{value}{term}") % 10
            assert step == f"{value}{term}={result}"
            value = result
        assert row["answer"] == str(value)


def test_held_out_questions_are_not_in_training_and_seeds_differ():
    train, held_out = equations.split(300, 1)
    assert len({row["question"] for row in held_out}) == 300
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    assert equations.split(300, 1)[1] == held_out != equations.split(300, 2)[1]


def test_explicit_rows_with_and_without_steps():
    rows = [{"question": "7*3+4=", "steps": ["7*3=1", "1+4=5"], "answer": "5"}]
    assert equations.explicit(rows)[0] == {"prompt": "7*3+4=", "completion": "7*3=1;1+4=5;#5", "answer": "5"}
    assert equations.explicit(rows, steps=False)[0]["completion"] == "#5"


def test_every_character_has_a_token():
    tokenizer = equations.tokenizer()
    train, _ = equations.split(1, 0)
    text = "".join(set("".join(f"{r['question']}{';'.join(r['steps'])}#{r['answer']}" for r in train[:500])))
    assert tokenizer.unk_token_id not in tokenizer(text)["input_ids"]
    assert equations.config(tokenizer).num_hidden_layers == 2
