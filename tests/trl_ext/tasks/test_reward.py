"""Reward 1 for a right number behind exactly one delimiter, else 0."""

import pytest

from trl_ext.tasks.reward import final_answer, make_reward


@pytest.mark.parametrize(
    "text, gold, expected",
    [
        ("2+2=4 #### 4", "4", 1.0),
        ("####4", "4", 1.0),
        ("so #### 1,000", "1000", 1.0),
        ("so #### $18", "18", 1.0),
        ("so #### 18.0", "18", 1.0),
        ("so #### 5", "4", 0.0),
        ("4", "4", 0.0),  # no delimiter
        ("#### 4 #### 4", "4", 0.0),  # two of them
        ("4 ####", "4", 0.0),  # nothing behind it
        ("#### four hundred", "4", 0.0),
        ("", "4", 0.0),
    ],
)
def test_reward(text, gold, expected):
    reward = make_reward("####")
    assert reward([text], answer=[gold]) == [expected]
    assert reward([[{"role": "assistant", "content": text}]], answer=[gold]) == [expected]


def test_the_delimiter_is_the_callers():
    assert final_answer("a => 3", "=>") == "3"
    assert make_reward("=>")(["a => 3"], answer=["3"], prompts=["x"]) == [1.0]


def test_an_empty_delimiter_is_named_before_anything_is_scored():
    with pytest.raises(ValueError, match="delimiter is empty"):
        make_reward("")
