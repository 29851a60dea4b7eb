"""The embedded default's files: read by the adapters of the published formats, held-out sums apart, the same each time."""

import json
import re

import pytest

from trl_ext import load_minimind_data
from trl_ext.minimind.embedded import DELIMITER, FROM, WHO, Sizes, write_embedded
from trl_ext.tasks.reward import final_answer


KINDS = {"pretrain": "pretrain", "sft": "sft", "lora": "sft", "dpo": "dpo", "rl": "rl", "reason": "reason"}
SMALL = Sizes(pretrain=120, sft=200, lora=80, dpo=100, rl=150, reason=80, held_out=40)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("embedded")
    write_embedded(made, seed=0, sizes=SMALL)
    return made


def sum_in(text):
    return re.search(r"\d(?:[+-]\d)+", text)[0]


def test_every_file_is_of_its_kind_and_size(folder):
    for name, kind in KINDS.items():
        assert len(load_minimind_data(folder / f"{name}.jsonl", kind)) == getattr(SMALL, name)
        assert len(load_minimind_data(folder / f"{name}_eval.jsonl", kind)) == 40


def test_no_held_out_sum_is_trained_on_in_any_file(folder):
    def sums(side):
        files = [folder / f"{kind}{side}.jsonl" for kind in ("pretrain", "sft", "dpo", "rl", "reason")]
        found = " ".join(json.dumps(line) for file in files for line in file.read_text().splitlines())
        return set(re.findall(r"(?<![\d+=;-])\d(?:[+-]\d){2,3}(?![\d+-])", found))

    trained, held_out = sums(""), sums("_eval")
    assert len(held_out) == 40 and len(trained) > 300 and not trained & held_out


def test_answers_are_those_of_the_sums(folder):
    for row in load_minimind_data(folder / "rl.jsonl", "rl"):
        assert eval(sum_in(row["prompt"][0]["content"])) == int(row["answer"])
    for row in load_minimind_data(folder / "reason.jsonl", "reason"):
        asked, said = (message["content"] for message in row["messages"])
        assert re.search(r"<answer>\n(-?\d+)\n</answer>$", said)[1] == str(eval(sum_in(asked)))


def test_the_better_of_a_pair_is_right_and_the_other_wrong(folder):
    for row in load_minimind_data(folder / "dpo.jsonl", "dpo"):
        answer = eval(sum_in(row["prompt"][0]["content"]))
        right, wrong = (final_answer(row[side][0]["content"], DELIMITER) for side in ("chosen", "rejected"))
        assert int(right) == answer != int(wrong)


def test_dialogues_leave_something_to_learn(folder):
    rows = [
        r["messages"]
        for r in load_minimind_data(folder / "sft.jsonl", "sft")
        if DELIMITER in r["messages"][1]["content"]
    ]
    right = sum(int(final_answer(said["content"], DELIMITER)) == eval(sum_in(asked["content"])) for asked, said in rows)
    assert 0.3 < right / len(rows) < 0.8


def test_ways_to_ask_who_it_is_are_held_out(folder):
    def asked(name):
        return {row["messages"][0]["content"] for row in load_minimind_data(folder / f"{name}.jsonl", "sft")}

    assert not asked("lora") & asked("lora_eval")
    assert asked("lora") | asked("lora_eval") == {*WHO[0], *FROM[0]}
    assert asked("lora_eval") == {*WHO[0][3::4], *FROM[0][3::4]}


def test_the_same_seed_writes_the_same(folder, tmp_path):
    write_embedded(tmp_path / "again", 0, SMALL)
    write_embedded(tmp_path / "other", 1, SMALL)
    for file in folder.iterdir():
        assert file.read_text() == (tmp_path / "again" / file.name).read_text()
        if "lora" not in file.name:
            assert file.read_text() != (tmp_path / "other" / file.name).read_text()
