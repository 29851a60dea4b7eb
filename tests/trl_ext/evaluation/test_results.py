"""What an evaluation found, against counting by hand."""

from itertools import combinations

import pytest

from trl_ext.evaluation.results import majority, pass_at, result_of
from trl_ext.evaluation.tasks import EvaluationTask
from trl_ext.tasks.evaluation import wilson_interval


LENGTHS = (3, 5, 4, 9, 7)
ROWS = [{"question": "q", "prompt": "q" * n, "answer": str(i)} for i, n in enumerate(LENGTHS, start=1)]
TASK = EvaluationTask("sums", ROWS, "#", True, 8)
TEXTS = [
    ["x#1", "#1", "#2", "#1.0"],
    ["#2", "#3", "#3", "#2.0"],
    ["", "x", "#3", "#4"],
    ["4"] * 4,
    ["#5#5", "#5", "#6", "#6"],
]
RIGHT = [3, 2, 1, 0, 1]
COSTS = {"completions": 20, "tokens": 100, "forwards": 140, "latent": 70, "seconds": 2.0}


@pytest.fixture
def result():
    return result_of(TASK, "on", TEXTS, COSTS)


def test_accuracy_is_the_share_of_right_texts(result):
    assert result.right == RIGHT and result.accuracy == sum(RIGHT) / 20
    assert (result.low, result.high) == wilson_interval(sum(RIGHT) / 4, 5)
    assert result.answered == 13 / 20


def test_costs_are_means(result):
    assert (result.tokens, result.forwards, result.latent_share, result.seconds) == (5, 7, 0.5, 0.1)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pass_at_k_is_the_mean_over_all_choices_of_k_texts(k):
    by_hand = 0
    for count in RIGHT:
        texts = [True] * count + [False] * (4 - count)
        chosen = list(combinations(texts, k))
        by_hand += sum(map(any, chosen)) / len(chosen) / len(RIGHT)
    assert pass_at(RIGHT, 4, k) == pytest.approx(by_hand, abs=1e-12)


def test_majority_counts_the_same_number_once(result):
    assert [majority(TASK, texts) for texts in TEXTS] == ["1", "2", "3", None, "6"]
    assert result.maj_at == {2: 3 / 5, 4: 3 / 5} and result.pass_at.keys() == {1, 2, 4}


def test_lengths_are_in_quarters_from_the_shortest():
    rows = [{"question": "q", "prompt": "q" * (i // 2), "answer": "1"} for i in range(8)]
    texts = [["#1"] if i < 4 else ["#2"] for i in range(8)]
    one = {**COSTS, "completions": 8}
    found = result_of(EvaluationTask("sums", rows, "#", True, 8), "on", texts, one)
    assert found.by_length == [(0, 2, 1.0), (1, 2, 1.0), (2, 2, 0.0), (3, 2, 0.0)]
    same = [{**row, "prompt": "q"} for row in rows]
    found = result_of(EvaluationTask("sums", same, "#", True, 8), "on", texts, one)
    assert found.by_length == [(1, 8, 0.5)]
    few = result_of(EvaluationTask("sums", rows[5:], "#", True, 8), "on", texts[5:], {**COSTS, "completions": 3})
    assert few.by_length == [(3, 3, 0.0)]


@pytest.mark.parametrize(
    "marker, numeric, text, answer, right",
    [
        ("#", True, "1+1=2#2", "2", True),
        ("#", True, "#2,000", "2000", True),
        ("#", True, "#2#2", "2", False),
        ("#", True, "2", "2", False),
        ("", False, " a b ", "a b", True),
        ("", False, "a", "a b", False),
        ("", False, "", "", False),
    ],
)
def test_right_answers(marker, numeric, text, answer, right):
    assert EvaluationTask("x", [], marker, numeric, 8).is_right(text, answer) is right


def test_all_texts_count_where_their_number_is_no_power_of_two():
    texts = [some[:3] for some in TEXTS]
    found = result_of(TASK, "on", texts, {**COSTS, "completions": 15})
    assert found.pass_at.keys() == {1, 2, 3} and found.maj_at.keys() == {2, 3}


@pytest.mark.parametrize(
    "text, found",
    [
        ("2+3=5\n#### 5\n\nQ2?\n2+2=4\n#### 4", "5"),
        ("2+3=5\n####\n5\n\nA farmer has 7 cows.", "5"),
        ("#### 5", "5"),
        ("no", None),
    ],
)
def test_what_follows_an_answer_is_not_read_without_a_chat_template(text, found):
    assert EvaluationTask("x", [], "####", True, 8, goes_on=True).answer_in(text) == found
