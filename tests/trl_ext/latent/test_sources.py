"""Lines of GSM8K-Aug and rows of GSM8K, in files of every shape."""

import json

import pytest
from datasets import Dataset

from tests import tiny
from trl_ext.latent.data import LatentDataError, LatentTokenizer
from trl_ext.latent.sources import load_rows, row_of_aug, row_of_gsm8k
from trl_ext.tasks.files import DataError


def test_equations_and_sentences():
    assert row_of_aug("Out of 600, 30% cook. How many?||<<600*30/100=180>> <<600-180=420>> #### 420", "f, line 1") == {
        "question": "Out of 600, 30% cook. How many?",
        "steps": ["<<600*30/100=180>>", "<<600-180=420>>"],
        "answer": "420",
    }
    assert row_of_aug("Q?||Half of 1,000 is 0.5 thousand. It sinks to -3. #### $-1,203.50", "f, line 2")["steps"] == [
        "Half of 1,000 is 0.5 thousand.",
        "It sinks to -3.",
    ]


@pytest.mark.parametrize(
    "text, number", [("-7", "-7"), ("$1,203", "1203"), ("3.5 km", "3.5"), (" 12", "12"), ("-$4", "-4")]
)
def test_numbers(text, number):
    assert row_of_aug(f"Q?||<<1=1>> #### {text}", "f")["answer"] == number


def test_gsm8ks_own_annotations():
    row = {"question": "How many?", "answer": "She sold 48/2 = <<48/2=24>>24 clips.\nSo <<48+24=72>>72.\n#### 72"}
    assert row_of_gsm8k(row, "f") == {"question": "How many?", "steps": ["<<48/2=24>>", "<<48+24=72>>"], "answer": "72"}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: row_of_aug("no bars #### 3", "a.txt, line 4"), "a.txt, line 4: no '||'"),
        (lambda: row_of_aug("Q||<<1=1>> 3", "a.txt, line 4"), "no '####'"),
        (lambda: row_of_aug("Q||<<1=1>> #### three", "a.txt, line 4"), "not one number after '####'"),
        (lambda: row_of_aug("Q|| #### 3", "a.txt, line 4"), "no step"),
        (
            lambda: row_of_gsm8k({"question": "Q", "answer": "It is 3.\n#### 3"}, "b, row 2"),
            "b, row 2: no <<a*b=c>> step",
        ),
        (lambda: row_of_gsm8k({"question": "Q"}, "b, row 2"), "b, row 2: answer is not a text: None"),
    ],
)
def test_bad_rows_are_named(make, message):
    with pytest.raises(LatentDataError) as error:
        make()
    assert message in str(error.value)


GOOD = {"question": "2+3+4=", "steps": ["<<2+3=5>>", "<<5+4=9>>"], "answer": "9"}
COT = {"question": "2+3+4=", "cot": "<<2+3=5>> <<5+4=9>>", "answer": "9"}
ANNOTATED = {"question": "2+3+4=", "answer": "It is <<2+3=5>>5, <<5+4=9>>9.\n#### 9"}
AUG = ["2+3+4=||<<2+3=5>> <<5+4=9>> #### 9", "no bars", "5||<<1=1>> #### none", "5||#### 3"]
SHAPES = {
    "aug.txt": lambda path: path.write_text("\n".join(AUG) + "\n"),
    "steps.jsonl": lambda path: lines(
        path, [GOOD, {**GOOD, "steps": []}, {**GOOD, "answer": True}, {**GOOD, "question": " "}]
    ),
    "cot.json": lambda path: lines(path, [COT, {**COT, "cot": " "}]),
    "gsm8k.parquet": lambda path: Dataset.from_list([ANNOTATED, {**ANNOTATED, "answer": "#### 1"}]).to_parquet(path),
}
BAD = {
    "aug.txt": {
        "no '||' between question and steps": "line 2",
        "not one number after '####'": "line 3",
        "no step before '####'": "line 4",
    },
    "steps.jsonl": {"no step": "line 2", "answer is not a text": "line 3", "question is empty": "line 4"},
    "cot.json": {"no step before '####'": "line 2"},
    "gsm8k.parquet": {"no <<a*b=c>> step before '####'": "row 1"},
}


def bare(rows):
    return [{column: row[column] for column in GOOD} for row in rows]


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", SHAPES)
def test_files_give_usable_rows_and_an_account_of_the_others(tmp_path, name):
    path = tmp_path / name
    SHAPES[name](path)
    rows = load_rows(str(path))
    assert bare(rows.usable) == [GOOD] and rows.read == 1 + len(BAD[name])
    assert rows.unusable.keys() == BAD[name].keys()
    report = rows.report()
    assert f"1 of {rows.read} rows usable" in report
    for reason, where in BAD[name].items():
        assert f"1: {reason} (first: dataset {path}, {where}: {reason}: " in report


@pytest.mark.parametrize("name, usable", [("aug.txt", 2), ("steps.jsonl", 2), ("cot.json", 2), ("gsm8k.parquet", 2)])
def test_evaluation_needs_no_steps(tmp_path, name, usable):
    SHAPES[name](tmp_path / name)
    rows = load_rows(str(tmp_path / name), need_steps=False).usable
    assert len(rows) == usable and rows[1]["steps"] == []


def test_size_is_of_rows_read(tmp_path):
    lines(tmp_path / "a.jsonl", [GOOD] * 5)
    assert load_rows(str(tmp_path / "a.jsonl"), size=3).read == 3


def test_rows_too_long_for_the_trainer_are_counted_too(tmp_path):
    lines(tmp_path / "a.jsonl", [{**GOOD, "steps": []}, GOOD, {**GOOD, "question": "1+" * 50}, GOOD])
    rows = load_rows(str(tmp_path / "a.jsonl"))
    tokens = rows.map(LatentTokenizer(tiny.tokenizer(()), "##", ";", True, max_length=60))
    assert len(tokens) == 2 and bare(rows.usable) == [GOOD, GOOD] and "2 of 4 rows usable" in rows.report()
    assert "1: more tokens than max_length=60; raise it, or leave the row out (first: dataset" in rows.report()
    assert "a.jsonl, line 3" in rows.report()


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "x"}\n', "has the columns prompt, but it needs question and answer"),
        ('{"question": "x", "answer": "3"}\n', "0 of 1 rows usable"),
        ("{not json\n", "line 1: not JSON: "),
        ("[1, 2]\n", "line 1: not a JSON object: [1, 2]"),
        ("", "the file is empty"),
        ('{"text": 3}\n', "text is not a text: 3"),
        ('{"question": "x", "steps": ["a"], "answer": "b"}\n', "not one number in the answer: 'b'"),
        ('{"question": "x", "steps": [1], "answer": "3"}\n', "steps is not a list of texts: [1]"),
    ],
)
def test_a_file_without_a_usable_row_is_an_error(tmp_path, text, message):
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(DataError) as error:
        load_rows(str(tmp_path / "a.jsonl"))
    assert ("rows usable" in str(error.value)) == ("rows usable; 1: " in str(error.value))
    assert message in str(error.value) and "a.jsonl" in str(error.value)
