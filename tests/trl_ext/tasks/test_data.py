"""Good data is read; each kind of bad data is refused with the file, the column or the row in the message."""

import json

import pytest
from datasets import Dataset

from trl_ext.tasks.data import DataArguments, chat_dataset, is_generator, load_rows
from trl_ext.tasks.files import DataError


GOOD = [
    {"question": "2 and 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"},
    {"question": "A thousand and 1?", "answer": "#### 1,001"},
]


def jsonl(tmp_path, rows):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def load(name, **changes):
    return load_rows(name, **{"split": "train", "size": None, "seed": 0, **changes})


def test_jsonl_and_parquet(tmp_path):
    rows = load(jsonl(tmp_path, GOOD))
    assert [row["answer"] for row in rows] == ["5", "1001"] and rows[0]["solution"] == "2+3=<<2+3=5>>5"
    Dataset.from_list(GOOD).to_parquet(tmp_path / "rows.parquet")
    assert load(str(tmp_path / "rows.parquet")) == rows
    assert len(load(jsonl(tmp_path, GOOD), size=1)) == 1


def test_generators_are_seeded_and_exact():
    assert is_generator("chain_sum") and is_generator("gsm_symbolic") and not is_generator("openai/gsm8k")
    rows = load("gsm_symbolic", size=5, seed=3)
    assert rows == load("gsm_symbolic", size=5, seed=3) != load("gsm_symbolic", size=5, seed=4)
    for row in load("chain_sum", size=20):
        assert int(row["answer"]) == eval(row["solution"].rpartition("=")[0])


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"problem": "x", "answer": "#### 1"}], "no column 'question'.*problem"),
        ([{"question": "x", "solution": "#### 1"}], "no column 'answer'"),
        ([*GOOD, {"question": "x", "answer": "no idea"}], "line 3.*no idea"),
        ([*GOOD, {"question": "x", "answer": "#### many"}], "line 3.*many"),
        ([*GOOD, {"question": " ", "answer": "#### 3"}], "line 3.*question is empty"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        load(jsonl(tmp_path, rows))


def test_missing_broken_and_empty_files(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        load(str(tmp_path / "none.jsonl"))
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(DataError, match=r"cut\.parquet cannot be read"):
        load(str(tmp_path / "cut.parquet"))
    (tmp_path / "cut.jsonl").write_text('{"question": "x", "ans')
    with pytest.raises(DataError, match=r"cut\.jsonl, line 1: not JSON"):
        load(str(tmp_path / "cut.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    Dataset.from_list(GOOD).select([]).to_parquet(tmp_path / "empty.parquet")
    (tmp_path / "blank.txt").write_text("\n \n")
    for name, said in (
        ("empty.jsonl", ": the file is empty"),
        ("empty.parquet", " has no rows"),
        ("blank.txt", " has no rows"),
    ):
        with pytest.raises(DataError, match=f"{name}{said}"):
            load(str(tmp_path / name))


def test_chat_prompts_ask_for_the_delimiter():
    row = chat_dataset([{"question": "2?", "answer": "2"}], "=>")[0]
    assert [m["role"] for m in row["prompt"]] == ["system", "user"] and "=>" in row["prompt"][0]["content"]


def test_solved_examples_come_before_the_question():
    row = chat_dataset(
        [{"question": "2?", "answer": "2"}], "#", [{"question": "5?", "answer": "5", "solution": "2+3=<<2+3=5>>5"}]
    )[0]
    assert [m["content"] for m in row["prompt"]][1:] == ["5?", "2+3=5\n# 5", "2?"]


def question(i):
    return {"question": f"{i} and 1?", "answer": f"#### {i + 1}"}


@pytest.mark.parametrize("eval_file", [None, "held.jsonl"])
def test_no_question_is_on_two_sides(tmp_path, eval_file):
    """Rows 0..19, of which 5 and 0 come again in the end: held-out questions leave training, shown ones leave held-out."""
    rows = [*map(question, range(20)), question(5), question(0)]
    data = DataArguments(dataset=jsonl(tmp_path, rows), num_fewshot=2)
    if eval_file:
        eval_file = str(tmp_path / eval_file)
        Dataset.from_list([question(i) for i in (5, 1, 30, 31)]).to_json(eval_file)
    size = {"train_size": 4, "eval_dataset": eval_file, "eval_size": 4, "seed": 0}
    found = [[int(row["question"].split()[0]) for row in part] for part in data.split(**size)]
    assert found == [[0, 1], [2, 3, 4, 6], [5, 30, 31] if eval_file else [18, 19, 5]]


@pytest.mark.parametrize("name,number", [("tiny", 1), ("rows.jsonl", -1)])
def test_examples_that_cannot_be_shown_are_named(name, number):
    with pytest.raises(ValueError, match=f"num_fewshot={number}"):
        DataArguments(dataset=name, num_fewshot=number)


def test_generated_questions_are_on_one_side():
    """Among chains of two one-digit terms many occur twice."""
    data = DataArguments(dataset="chain_sum", dataset_options={"max_terms": 2, "max_digits": 1})
    _, train, held_out = data.split(train_size=200, eval_dataset=None, eval_size=50, seed=0)
    assert len(held_out) == 50 and 2 <= len(train) < 200
    assert not {row["question"] for row in train} & {row["question"] for row in held_out}


def test_options_are_the_generators_alone(tmp_path):
    rows = jsonl(tmp_path, [question(i) for i in range(5)])
    with pytest.raises(ValueError, match=r"rows\.jsonl is not a reasoning-gym generator"):
        DataArguments(dataset=rows, dataset_options={"max_terms": 2})
    data = DataArguments(dataset="chain_sum", dataset_options={"max_terms": 2})
    _, train, held_out = data.split(train_size=3, eval_dataset=rows, eval_size=5, seed=0)
    assert len(train) == 3 and len(held_out) == 5


def test_a_file_without_rows_to_train_on_is_named(tmp_path):
    data = DataArguments(dataset=jsonl(tmp_path, [question(i) for i in range(5)]))
    with pytest.raises(DataError, match=r"rows\.jsonl has 5 row.*eval_size=5.*lower eval_size"):
        data.split(train_size=None, eval_dataset=None, eval_size=5, seed=0)
    for held in (1, 4):  # one row is enough on either side
        found = data.split(train_size=None, eval_dataset=None, eval_size=held, seed=0)
        assert [len(side) for side in found] == [0, 5 - held, held]
    found = DataArguments(dataset="chain_sum").split(train_size=1, eval_dataset=None, eval_size=1, seed=0)
    assert [len(side) for side in found] == [0, 1, 1]


def test_duplicates_that_leave_nothing_are_named(tmp_path):
    data = DataArguments(dataset=jsonl(tmp_path, [question(1)] * 60))
    with pytest.raises(
        DataError, match=r"rows\.jsonl: the questions of 50 of its 50 rows are held out.*no row.*duplicates"
    ):
        data.split(train_size=None, eval_dataset=None, eval_size=10, seed=0)
    data = DataArguments(
        dataset=jsonl(tmp_path, [question(1)] * 30 + [question(i) for i in range(2, 20)]), num_fewshot=1
    )
    with pytest.raises(DataError, match=r"29 of its 29 rows are shown in every prompt"):
        held = jsonl(tmp_path / "..", [question(1)] * 29)
        data.split(train_size=None, eval_dataset=held, eval_size=29, seed=0)
