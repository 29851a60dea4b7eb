"""One reader for HRPO's rows, latent distillation's and MiniMind's: what one takes the others take, and refuse alike."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

from trl_ext import load_minimind_data
from trl_ext.latent import sources
from trl_ext.tasks import data, files
from trl_ext.tasks.files import DataError, answer_text, number_in, read_json_rows, read_lines


ROW = {"question": "Ä 2+3?", "answer": "<<2+3=5>>\n#### 5", "text": "Ä\u2028b"}
READERS = {
    "hrpo": lambda name: [row["answer"] for row in data.load_rows(name, split="train", size=None, seed=0)],
    "latent": lambda name: [row["answer"] for row in sources.load_rows(name).usable],
    "minimind": lambda name: ["5" for _ in load_minimind_data(name, "pretrain")],
}
LINE = (json.dumps(ROW, ensure_ascii=False) + "\n").encode()


@pytest.fixture(params=READERS)
def read(request, tmp_path):
    def read_bytes(content: bytes):
        (tmp_path / "rows.jsonl").write_bytes(content)
        return READERS[request.param](str(tmp_path / "rows.jsonl"))

    return read_bytes


@pytest.mark.parametrize(
    "content",
    [LINE * 2, b"\xef\xbb\xbf" + LINE * 2, LINE.replace(b"\n", b"\r\n") + b"\n \n" + LINE.rstrip()],
    ids=["plain", "byte order mark", "Windows line ends, blank lines, none at the end"],
)
def test_every_reader_takes_it(read, content):
    assert read(content) == ["5", "5"]


@pytest.mark.parametrize(
    "content, message",
    [
        (
            LINE + LINE.decode().encode("latin-1", "replace"),
            r"line 2: not UTF-8 \(byte 0xc4 at position 15\); save the file",
        ),
        (LINE.decode().encode("utf-16"), "rows.jsonl is UTF-16, or another .*; save it as UTF-8"),
        (LINE.decode().encode("utf-16-be"), "rows.jsonl is UTF-16, or another .*; save it as UTF-8"),
        (LINE.decode().encode("utf-32"), "rows.jsonl is UTF-16, or another .*; save it as UTF-8"),
        (LINE + LINE.replace(b"2+3?", rb"\ud83d 2?"), r"line 2: not Unicode, half a surrogate pair: .*\\ud83d"),
        (b"{\n" + LINE[1:], r"line 1: not JSON: .*; write each object on one line"),
        (LINE + b'{"question": "x", "ans', "line 2: not JSON: .* at character"),
        (LINE + b"[1]\n", r"line 2: not a JSON object: \[1\]"),
        (b"\n\n", "has no rows"),
        (b"", "the file is empty"),
    ],
)
def test_every_reader_refuses_it_alike(read, content, message):
    with pytest.raises(DataError, match=message):
        read(content)


@pytest.mark.parametrize(
    "text, number",
    [
        ("18", "18"),
        (" $1,203. ", "1203"),
        ("-3.5 km", "-3.5"),
        ("-$4", "-4"),
        (".5", ".5"),
        ("12%", "12"),
        ("1e5", "1e5"),
        ("nan", None),
        ("inf", None),
        ("1_000", None),
        ("3 or 4", None),
        ("1/2", None),
        ("x2", None),
        ("", None),
        ("5km", None),
        ("1.2.3", None),
        ("3,5", None),
        ("1,2,3", None),
        ("12,3456", None),
        ("1,00,000", "100000"),
        ("1,234.5", "1234.5"),
        ("\u22123", "-3"),
        (" - 3", "-3"),
        ("- $3", "-3"),
        ("5 - 3", None),
        ("\uff15", None),
        ("2\u00bd", None),
    ],
)
def test_the_number_in_an_answer(text, number):
    assert number_in(text) == number


@pytest.mark.parametrize("bad", ["#### nan", "#### 1_000", "#### 3 or 4", float("nan"), True, None, [5]])
def test_answers_without_one_number_name_their_row(tmp_path, bad):
    name = str(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps({**ROW, "answer": bad}) + "\n")
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: .*answer"):
        READERS["hrpo"](name)
    found = sources.load_rows(name)
    assert len(found.usable) == 1 and "rows.jsonl, line 2" in found.report() and "1 of 2" in found.report()


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("answer", [18, 18.0], ids=repr)
def test_answers_that_are_numbers(tmp_path, suffix, answer):
    rows = [{"question": "q", "steps": ["<<9+9=18>>"], "answer": answer}] * 2
    name = str(tmp_path / f"rows.{suffix}")
    table = Dataset.from_list(rows)
    table.to_json(name) if suffix == "jsonl" else table.to_parquet(name)
    assert READERS["hrpo"](name) == READERS["latent"](name) == ["18", "18"]
    assert answer_text(0.25) == "0.25" and answer_text(True) is True and answer_text(10**400) == "1" + "0" * 400


def test_json_lists_and_places(tmp_path):
    (tmp_path / "a.json").write_text(f"[{json.dumps(ROW)},\n {json.dumps(ROW)}]")
    assert list(read_json_rows(str(tmp_path / "a.json"))) == [("row 0", ROW), ("row 1", ROW)]
    (tmp_path / "a.json").write_text("[1, 2")
    with pytest.raises(DataError, match=r"a\.json: not JSON"):
        list(read_json_rows(str(tmp_path / "a.json")))
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\x85\n")
    with pytest.raises(DataError, match=r"a\.txt, line 3: not UTF-8 \(byte 0x85 at position 4\)"):
        list(read_lines(str(tmp_path / "a.txt")))


def test_a_reason_that_is_a_whole_schema_is_cut(monkeypatch):
    def refuse(*_, **__):
        raise ValueError("Couldn't cast\n" + "version: string\n" * 100)

    monkeypatch.setattr(files, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"^dataset some: Couldn't cast version: string") as error:
        files.read_rows("some", split="train")
    assert len(str(error.value)) < 300


def test_tables_of_other_kinds_are_refused_before_the_hub_is_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("rows.txt").write_text("1+1=2")
    Path("folder.csv").mkdir()
    for name in ("rows.txt", "absent.csv", "absent.tsv", "folder.csv"):
        with pytest.raises(DataError, match=rf"^dataset {name}: name a \.\w+.* file or a hub id$"):
            files.read_table(name, split="train")


@pytest.mark.parametrize("reader", ["hrpo", "latent", "minimind"])
def test_a_folder_in_place_of_a_file(tmp_path, reader):
    (tmp_path / "rows.jsonl").mkdir()
    with pytest.raises(DataError, match=r"rows\.jsonl is a folder; name a file"):
        READERS[reader](str(tmp_path / "rows.jsonl"))


def test_what_is_not_there_is_said_of_the_folder_first(tmp_path, monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'rows' on the Hub")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(files, "load_dataset", offline)
    with pytest.raises(
        DataError, match=rf"^dataset rows: there is no folder rows in {tmp_path}, and the hub says: Couldn't"
    ):
        files.read_table("rows", split="train")
    for name in ("./rows", "../rows", str(tmp_path / "rows")):
        with pytest.raises(DataError, match=rf"^dataset {name}: there is no such file or folder$"):
            files.read_table(name, split="train")


def test_a_hub_id_with_a_dot_is_no_file():
    arguments = data.DataArguments(dataset="someone/data-v1.5")
    with pytest.raises(DataError, match=r"dataset someone/data-v1\.5: (?!there is no such file)"):
        arguments.split(train_size=None, eval_dataset=None, eval_size=5, seed=0)
