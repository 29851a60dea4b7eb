"""Lines of GSM8K-Aug and rows of GSM8K."""

import pytest

from trl_ext.latent.data import LatentDataError
from trl_ext.latent.sources import row_of_aug, row_of_gsm8k


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
        (lambda: row_of_aug("Q||<<1=1>> #### three", "a.txt, line 4"), "no number after '####'"),
        (lambda: row_of_aug("Q|| #### 3", "a.txt, line 4"), "no step"),
        (lambda: row_of_gsm8k({"question": "Q", "answer": "It is 3.\n#### 3"}, "b, row 2"), "b, row 2: no step"),
        (lambda: row_of_gsm8k({"question": "Q"}, "b, row 2"), "b, row 2: answer is None"),
    ],
)
def test_bad_rows_are_named(make, message):
    with pytest.raises(LatentDataError) as error:
        make()
    assert message in str(error.value)
