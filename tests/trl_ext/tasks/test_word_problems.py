"""Word problems have right steps, and their questions say what the steps count."""

import re

from trl_ext.tasks.word_problems import problems, split


def test_each_step_is_right_and_the_last_one_gives_the_answer():
    rows = problems(50, seed=3)
    assert len(rows) == 50 and rows == problems(50, seed=3) != problems(50, seed=4)
    for row in rows:
        numbers = [int(n) for n in re.findall(r"\d+", row["question"])]
        assert re.fullmatch(r"How many legs are there in total if you have (\d+ [a-z ]+(, )?){3}\?", row["question"])
        assert len(row["steps"]) == 5 and all(1 <= n <= 9 for n in numbers)
        results = []
        for step in row["steps"]:
            work, _, result = step.partition("=")
            left, right = map(int, re.split(r"[*+]", work))
            assert int(result) == (left * right if "*" in work else left + right)
            results.append(int(result))
        products, sums = [results[i] for i in (0, 1, 3)], [results[i] for i in (2, 4)]
        assert sums == [products[0] + products[1], sum(products)] and row["answer"] == str(sums[-1])
        assert [int(step.split("*")[0]) for step in row["steps"] if "*" in step] == numbers


def test_options_and_that_no_question_is_on_both_sides():
    train, held_out = split(300, 100, 0, animals=1, instances=3)
    assert 60 < len(train) + len(held_out) < 111  # of 37 animals, up to three of each
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}
    assert all(len(row["steps"]) == 1 for row in train + held_out)
    seeds = [{row["question"] for rows in split(300, 100, seed) for row in rows} for seed in (0, 1)]
    assert not seeds[0] & seeds[1]
