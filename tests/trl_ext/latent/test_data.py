"""Rows become the sequences that the docstring draws, and bad ones are named."""

import pytest

from tests import tiny
from trl_ext.latent.data import LatentCollator, LatentDataError, LatentTokenizer


ROWS = [
    {"question": "1+2+3=", "steps": ["1+2=3", "3+3=6"], "answer": "6"},
    {"question": "7-4=", "steps": ["7-4=3"], "answer": "3"},
    {"question": "10+20+30=", "steps": ["10+20=30", "30+30=60", "so 60"], "answer": "60"},
]


def tokens(**changes):
    settings = {"answer_prompt": "##", "step_separator": ";", "drop_last_step": True, "max_length": None, **changes}
    return LatentTokenizer(tiny.tokenizer(()), **settings)


def text(ids, mask):
    return tiny.tokenizer(()).decode([i for i, m in zip(ids.tolist(), mask.tolist(), strict=True) if m])


def test_sequences_and_where_the_first_answer_token_is_predicted():
    rows = [tokens()(row, i, "train") for i, row in enumerate(ROWS)]
    batch = LatentCollator(pad_token_id=0, eot_token_id=50)(rows)
    assert [text(*x) for x in zip(batch["question_ids"], batch["question_mask"], strict=True)] == [
        "1+2+3=",
        "7-4=",
        "10+20+30=",
    ]
    assert batch["question_mask"][:, -1].all() and batch["attention_mask"][:, 0].all()
    assert [text(*x) for x in zip(batch["teacher_ids"], batch["trace_mask"], strict=True)] == [
        "1+2=3;",
        "",
        "10+20=30;30+30=60;",
    ]
    assert [text(*x) for x in zip(batch["teacher_ids"], batch["answer_mask"], strict=True)] == [
        "##6<eos>",
        "##3<eos>",
        "##60<eos>",
    ]
    assert batch["input_ids"][:, 0].tolist() == [50, 50, 50]
    assert (batch["labels"][:, 0] == -100).all()
    asked = batch["labels"] != -100
    assert [text(*x) for x in zip(batch["input_ids"], asked, strict=True)] == ["##6<eos>", "##3<eos>", "##60<eos>"]
    first = [tiny.tokenizer(())(row["answer"][0])["input_ids"][0] for row in ROWS]
    for i in range(3):
        assert batch["teacher_ids"][i, batch["teacher_at"][i] + 1] == first[i]
        assert batch["input_ids"][i, batch["student_at"][i] + 1] == first[i]
    assert (batch["teacher_labels"][batch["teacher_mask"] == 0] == -100).all()


def test_a_step_without_a_result_is_named():
    row = {"question": "1+1=", "steps": ["1+1=2", "so 2"], "answer": "2"}
    assert tokens(results=True, drop_last_step=True)(row, 0, "train")["result_starts"] == [4]
    with pytest.raises(LatentDataError, match=r"train dataset, row 7: a step has no result after '='.*'so 2'"):
        tokens(results=True, drop_last_step=False)(row, 7, "train")
    with pytest.raises(LatentDataError, match=r"row 7: a step has no result after '='.*'1\+1= '"):
        tokens(results=True, drop_last_step=False)({**row, "steps": ["1+1= "]}, 7, "train")
    assert tokens(results=True, drop_last_step=False)({**row, "steps": ["1+1=  2"]}, 0, "t")["result_starts"] == [6]


def test_without_trace_and_prompt_the_question_predicts_the_answer():
    row = tokens(answer_prompt="")(ROWS[1], 0, "train")
    batch = LatentCollator(0, 50)([row])
    assert batch["teacher_at"].tolist() == [-1] and batch["student_at"].tolist() == [0]


def test_the_last_step_can_stay():
    assert text_of(tokens(drop_last_step=False)(ROWS[0], 0, "train")["trace_ids"]) == "1+2=3;3+3=6;"


def text_of(ids):
    return tiny.tokenizer(()).decode(ids)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": " "}, "question is not a text: ' '"),
        ({"question": None}, "question is not a text: None"),
        ({"answer": 6}, "answer is not a text: 6"),
        ({"steps": []}, "steps is not a list of one text or more: []"),
        ({"steps": "1+2=3"}, "one text or more: '1+2=3'"),
        ({"steps": ["1+2=3", ""]}, "steps is not a list"),
        ({"question": "1+" * 40}, "more tokens than max_length=60"),
    ],
)
def test_bad_rows_are_named(change, message):
    with pytest.raises(LatentDataError) as error:
        tokens(max_length=60)({**ROWS[0], **change}, 17, "eval")
    assert "eval dataset, row 17" in str(error.value) and message in str(error.value)
