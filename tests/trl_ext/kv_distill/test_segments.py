"""Prompt, reasoning and answer by token, against the texts."""

import logging

import pytest
import torch
from datasets import Dataset, IterableDataset

from tests import tiny
from trl_ext.kv_distill.segments import SegmentCollator, SegmentFinder, add_segments
from unsloth_ext import DelimiterMatcher

from . import setups


def found(trainer):
    """Of each row the texts of its three segments."""
    out = []
    for row in trainer.train_dataset:
        ids, segments = torch.tensor(row["input_ids"]), torch.tensor(row["segment_ids"])
        out.append(tuple(trainer.processing_class.decode(ids[segments == s]) for s in range(3)))
    return out


@pytest.mark.parametrize("merges", [(), ("##",), ("1#", "##")])
def test_segments_are_the_texts_own(tmp_path, merges):
    """Whatever tokens the delimiter falls into; EOS is the answer's."""
    trainer = setups.trainer(tmp_path, tokenizer=tiny.tokenizer(merges))
    wanted = []
    for row in setups.ROWS:
        thought, _, answer = row["completion"].partition("##")
        wanted.append((row["prompt"], thought + "##", answer + "<eos>"))
    assert sorted(found(trainer)) == sorted(wanted)


def test_a_token_that_holds_the_delimiters_end_belongs_to_the_reasoning():
    tokenizer = tiny.tokenizer(("#5",))
    finder = SegmentFinder(DelimiterMatcher(tokenizer, "##"))
    one, both, five, end = (tokenizer.convert_tokens_to_ids(t) for t in ("1", "#", "#5", "<eos>"))
    ids = [one, both, five, one, end]
    assert finder({"input_ids": [ids], "labels": [[-100, *ids[1:]]]})["segment_ids"] == [[0, 1, 1, 2, 2]]
    assert finder({"input_ids": [ids, [one]], "labels": [ids, [-100]]})["segment_ids"] == [[1, 1, 1, 2, 2], [0]]


def test_delimiters_in_the_prompt_do_not_count():
    rows = [{"prompt": "1##2=", "completion": "3##3"}] * 2
    data = [{"input_ids": tiny.tokenizer(())(r["prompt"] + r["completion"])["input_ids"]} for r in rows]
    data = [{**r, "labels": [-100] * 5 + r["input_ids"][5:]} for r in data]
    out = add_segments(Dataset.from_list(data), "train", tiny.tokenizer(()), "##")
    assert out["segment_ids"][0] == [0] * 5 + [1] * 3 + [2]


def test_rows_without_a_delimiter_are_counted_and_all_of_them_refused(tmp_path, caplog, monkeypatch):
    rows = [*setups.ROWS[:3], {"prompt": "1+1=", "completion": "2"}]
    monkeypatch.setattr(logging.getLogger("trl_ext"), "propagate", True)
    trainer = setups.trainer(tmp_path, rows=rows)
    assert any("1 of 4" in message for message in caplog.messages), caplog.messages
    assert ("1+1=", "2<eos>", "") in found(trainer)
    with pytest.raises(ValueError, match=r"train dataset: no row has text after the delimiter '----'"):
        setups.trainer(tmp_path, answer_delimiter="----")
    with pytest.raises(ValueError, match=r"no row has text after .* or raise max_length"):
        setups.trainer(tmp_path, max_length=5)


def test_rows_own_segments_are_kept_and_checked(tmp_path):
    ids = tiny.tokenizer(())("1+1=2##2")["input_ids"]
    row = {"input_ids": ids, "labels": ids, "segment_ids": [0] * 4 + [1] * 3 + [2]}
    trainer = setups.trainer(tmp_path, rows=[row] * 4)
    assert trainer.train_dataset[0]["segment_ids"] == row["segment_ids"]
    for wrong in ([0, 1], [0] * 7 + [3]):
        with pytest.raises(ValueError, match="train dataset, row 1: segment_ids"):
            setups.trainer(tmp_path, rows=[row, {**row, "segment_ids": wrong}])


def test_an_iterable_dataset_trains(tmp_path):
    rows = IterableDataset.from_generator(lambda: iter(setups.ROWS))
    trainer = setups.trainer(tmp_path, rows=rows, max_steps=2)
    trainer.train()
    assert "kv/loss" in trainer.state.log_history[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_collator_follows_the_inner_ones_padding(side):
    def inner(rows):
        assert all("segment_ids" not in row for row in rows)
        return tiny.tokenizer(()).pad(
            {"input_ids": [r["input_ids"] for r in rows]}, padding_side=side, return_tensors="pt"
        )

    rows = [{"input_ids": [5, 6, 7], "segment_ids": [0, 1, 2]}, {"input_ids": [8], "segment_ids": [1]}]
    ids = SegmentCollator(inner)(rows)["segment_ids"]
    assert ids.tolist() == [[0, 1, 2], [1, -1, -1] if side == "right" else [-1, -1, 1]]
