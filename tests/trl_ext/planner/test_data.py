"""What planner and executor are given of a row, by its number."""

import pytest
import torch
from datasets import Dataset, IterableDataset

from trl_ext.common.fingerprint import content_hash
from trl_ext.planner.data import HASHED, SAMPLE_ID, RowSplitter, cut

from . import setups


def texts(trainer, index):
    row = trainer.train_dataset[index]
    return [trainer._tokenizer.decode(row[name]) for name in ("plan_ids", "text_ids")]


def test_generate_reads_the_prompt_and_writes_the_completion(tmp_path):
    trainer = setups.trainer(tmp_path)
    for i, row in enumerate(setups.ROWS):
        assert texts(trainer, i) == [row["prompt"], row["completion"] + "<eos>"]
        assert trainer.train_dataset[i]["sample_id"] == i


@pytest.mark.parametrize("kind", ["prompts", "texts"])
def test_reconstruct_reads_what_it_writes(tmp_path, kind):
    rows = setups.ROWS if kind == "prompts" else [{"text": r["prompt"] + r["completion"]} for r in setups.ROWS]
    trainer = setups.trainer(tmp_path, rows=rows, mode="reconstruct")
    for i, row in enumerate(setups.ROWS):
        assert texts(trainer, i) == [row["prompt"] + row["completion"] + "<eos>"] * 2
        assert trainer.train_dataset[i]["text_labels"] == trainer.train_dataset[i]["text_ids"]


def test_batches_are_padded_on_the_right_and_every_token_has_a_label(tmp_path):
    trainer = setups.trainer(tmp_path)
    batch = setups.batch_of(trainer, [0, 7, 20])
    for r, i in enumerate([0, 7, 20]):
        row = trainer.train_dataset[i]
        for ids, mask, name in (
            ("plan_input_ids", "plan_attention_mask", "plan_ids"),
            ("input_ids", "attention_mask", "text_ids"),
        ):
            count = len(row[name])
            assert batch[ids][r, :count].tolist() == row[name]
            assert batch[mask][r].tolist() == [1] * count + [0] * (batch[mask].shape[1] - count)
        width = batch["input_ids"].shape[1]
        labels = row["text_ids"] + [-100] * (width - len(row["text_ids"]))
        assert batch["labels"][r].tolist() == [-100, *labels]
    assert batch["sample_id"].tolist() == [0, 7, 20]
    trainer.model.train()
    _, items = trainer.get_batch_samples(iter([batch, batch]), 2, torch.device("cpu"))
    assert items == 2 * batch["attention_mask"].sum() and trainer._step_rows == 6


def test_rows_keep_their_number_when_others_go_and_when_they_are_shuffled(tmp_path):
    rows = [*setups.ROWS[:5], {"prompt": "1" * 30, "completion": "2"}, *setups.ROWS[5:]]
    trainer = setups.trainer(tmp_path, rows=rows, max_length=20, shuffle_dataset=True)
    ids = trainer.train_dataset["sample_id"]
    assert sorted(ids) == [i for i in range(len(rows)) if i != 5] and ids != sorted(ids)
    for row in trainer.train_dataset:
        assert trainer._tokenizer.decode(row["plan_ids"]) == rows[row["sample_id"]]["prompt"]


@pytest.mark.parametrize(
    "changed, settings, message",
    [
        ({"prompt": "", "completion": "12"}, {}, "train dataset, row 3: its labels leave no prompt"),
        ({"prompt": "12", "completion": ""}, {}, "train dataset, row 3: its text is empty"),
        ({"prompt": "", "completion": ""}, {"mode": "reconstruct"}, "train dataset, row 3: its text is empty"),
        (
            {"prompt": "12", "completion": "3" * 12},
            {"max_length": 12, "truncation_mode": "keep_end"},
            "row 3: .*truncation_mode='keep_end', raise max_length",
        ),
    ],
)
def test_rows_without_a_part_are_named(tmp_path, changed, settings, message):
    rows = [*setups.ROWS[:3], changed, *setups.ROWS[3:]]
    with pytest.raises(ValueError, match=message):
        setups.trainer(tmp_path, rows=rows, **settings)


def test_texts_without_prompts_are_refused_where_one_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"row 0: its labels leave no prompt .*or set mode='reconstruct'"):
        setups.trainer(tmp_path, rows=[{"text": "1+2=3"}] * 4)
    with pytest.raises(ValueError, match="no row is left"):
        setups.trainer(tmp_path, max_length=1)


def test_max_length_cuts_as_sft_does(tmp_path):
    trainer = setups.trainer(tmp_path, max_length=8)
    for row in trainer.train_dataset:
        source = setups.ROWS[row["sample_id"]]
        whole = trainer._tokenizer(source["prompt"] + source["completion"] + "<eos>")["input_ids"]
        assert row["plan_ids"] + row["text_ids"] == whole[:8]


def test_labels_of_tokens_that_do_not_count_are_kept(tmp_path):
    rows = [{"input_ids": [5, 6, 7, 8, 9], "labels": [-100, -100, 7, -100, 9]}] * 4
    trainer = setups.trainer(tmp_path, rows=rows)
    row = trainer.train_dataset[0]
    assert (row["plan_ids"], row["text_ids"], row["text_labels"]) == ([5, 6], [7, 8, 9], [7, -100, 9])


def test_cut_texts(tmp_path):
    trainer = setups.trainer(tmp_path)
    batch = setups.batch_of(trainer)
    short = cut(batch, 2, "generate")
    assert torch.equal(short["input_ids"], batch["input_ids"][:, :2])
    assert torch.equal(short["labels"], batch["labels"][:, :3])
    assert torch.equal(short["plan_input_ids"], batch["plan_input_ids"])
    both = cut(batch, 2, "reconstruct")
    assert both["plan_input_ids"].shape[1] == both["plan_attention_mask"].shape[1] == 2
    assert cut(batch, None, "generate") is batch


def test_the_hash_is_of_the_content(tmp_path):
    ours = content_hash(setups.trainer(tmp_path).train_dataset, HASHED)
    assert ours == content_hash(setups.trainer(tmp_path / "b").train_dataset, HASHED)
    others = [
        setups.ROWS[:-1],
        [*setups.ROWS[:-1], {"prompt": "9=", "completion": "9"}],
        [setups.ROWS[1], setups.ROWS[0], *setups.ROWS[2:]],
    ]
    for rows in others:
        assert ours != content_hash(setups.trainer(tmp_path, rows=rows).train_dataset, HASHED)


def test_iterable_rows_are_planned_softly_and_refused_by_hard_em(tmp_path):
    rows = IterableDataset.from_generator(lambda: iter(setups.ROWS))
    trainer = setups.trainer(tmp_path, rows=rows, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2
    with pytest.raises(ValueError, match="the size of an iterable dataset is unknown"):
        setups.trainer(tmp_path, rows=rows, training="hard_em")
    with pytest.raises(ValueError, match="has no rows"):
        setups.trainer(tmp_path, rows=Dataset.from_dict({"prompt": [], "completion": []}))


def test_where_labels_are_missing_the_mask_says_which_tokens_count():
    """As in Unsloth's preparation; without either all do."""
    row, splitter = {"input_ids": [5, 6, 7], SAMPLE_ID: 0}, RowSplitter("generate", None, "train")
    masked = splitter({**row, "completion_mask": [0, 1, 0]})
    assert (masked["plan_ids"], masked["text_labels"]) == ([5], [6, -100])
    assert RowSplitter("reconstruct", None, "train")(row)["text_labels"] == [5, 6, 7]
