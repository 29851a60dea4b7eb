"""A teacher that reads longer reasoning than its student."""

import pytest
import torch
from datasets import Dataset, IterableDataset
from torch.nn import functional as F

from unsloth_ext import create_structural_loss

from . import setups
from .test_trainer import batch_of, plain_kvq


LONGER = [
    {**row, "teacher_completion": row["completion"].replace("; ", "; that is, by counting on, ")} for row in setups.ROWS
]


@pytest.mark.parametrize("case", ["default", "flat", "note", "closed form", "warped"])
def test_the_loss_is_that_of_both_texts_caches(tmp_path, case):
    """1e-5: each model's cache of its own text, the teacher's segments at the lengths of the student's."""
    trainer = setups.trainer(tmp_path, rows=LONGER, **setups.CASES[case])
    trainer.model.train()
    batch = batch_of(trainer)
    assert batch["teacher_input_ids"].shape[1] > batch["input_ids"].shape[1]
    loss = trainer.compute_loss(trainer.model, dict(batch))
    ours = {name: batch[name] for name in ("input_ids", "attention_mask")}
    theirs = {name: batch[f"teacher_{name}"] for name in ours}
    sides = plain_kvq(trainer.model, range(2), ours), plain_kvq(trainer.teacher, trainer.aligner.layers, theirs)
    with torch.no_grad():
        ids = batch["segment_ids"], batch["teacher_segment_ids"]
        s, t, mask = trainer.aligner.pairs(*sides, *ids, T_s=trainer.args.T_s)
        structural, _ = create_structural_loss(alpha_norm=trainer.args.alpha_norm)(*s, *t, mask)
        logits = trainer.model(**ours).logits
        ce = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    assert abs(loss - (ce + structural)) <= 1e-5


def test_the_same_text_twice_is_the_text(tmp_path):
    """1e-5."""
    rows = [{**row, "teacher_prompt": row["prompt"], "teacher_completion": row["completion"]} for row in setups.ROWS]
    losses = []
    for given in (setups.ROWS, rows):
        trainer = setups.trainer(tmp_path, rows=given)
        trainer.model.train()
        losses.append(trainer.compute_loss(trainer.model, batch_of(trainer)))
    assert abs(losses[0] - losses[1]) <= 1e-5


def test_a_padded_batch_is_its_rows(tmp_path):
    """The structural loss by token, 1e-5; what pads of either text hold does not matter."""
    trainer = setups.trainer(tmp_path, rows=LONGER)
    trainer.model.eval()

    def structural(batch):
        trainer.compute_loss(trainer.model, batch)
        return trainer._metrics["eval"]["kv/loss"][-1]

    lengths = [len(trainer.train_dataset[i]["input_ids"]) for i in range(4)]
    alone = sum(structural(batch_of(trainer, [i])) * n for i, n in enumerate(lengths)) / sum(lengths)
    batch = batch_of(trainer)
    assert structural(dict(batch)) == pytest.approx(alone, abs=1e-5)
    batch["teacher_input_ids"] = batch["teacher_input_ids"].masked_fill(batch["teacher_attention_mask"] == 0, 9)
    assert structural(batch) == pytest.approx(alone, abs=1e-5)


def test_it_trains_evaluates_and_resumes_exactly(tmp_path):
    changes = {"rows": LONGER, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    after = setups.trained(setups.trainer(tmp_path, **changes))
    again = setups.trainer(tmp_path, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(p, after[n]) for n, p in again._named_trained().items())
    assert any("eval_kv/loss" in entry for entry in again.state.log_history)


def test_tokenized_rows_are_taken_as_they_are(tmp_path):
    """What the trainer prepared, given again, is the same; what does not fit is named."""
    first = setups.trainer(tmp_path, rows=LONGER)
    columns = ["input_ids", "labels", "segment_ids", "teacher_input_ids", "teacher_segment_ids"]
    rows = first.train_dataset.select_columns(columns).to_list()
    again = setups.trainer(tmp_path, rows=rows)
    for trainer in (first, again):
        trainer.model.train()
    losses = [t.compute_loss(t.model, batch_of(t)) for t in (first, again)]
    assert losses[0] == losses[1]
    rows[2]["teacher_segment_ids"] = rows[2]["teacher_segment_ids"][:-1]
    with pytest.raises(ValueError, match="row 2: teacher_segment_ids must be 0, 1 or 2"):
        setups.trainer(tmp_path, rows=rows)


def test_rows_stay_together_where_one_text_is_left_out(tmp_path):
    """A prompt longer than `max_length` leaves no label, and its row is dropped."""
    rows = [dict(row) for row in LONGER]
    rows[1]["teacher_prompt"] = "9" * 60
    for row in rows:
        row.setdefault("teacher_prompt", row["prompt"])
    trainer = setups.trainer(tmp_path, rows=rows, max_length=55)
    assert len(trainer.train_dataset) == len(rows) - 1
    decode = trainer.processing_class.decode
    for row in trainer.train_dataset:
        ours, theirs = decode(row["input_ids"]), decode(row["teacher_input_ids"])
        assert ours.split("=")[0] == theirs.split("=")[0] and ours.split("##")[1] == theirs.split("##")[1]


def test_what_cannot_be_is_named(tmp_path):
    rows = [dict(row) for row in LONGER]
    rows[3]["teacher_completion"] = "no idea"
    with pytest.raises(ValueError, match="row 3: the teacher's text has no answer"):
        setups.trainer(tmp_path, rows=rows)
    tokens = [{"input_ids": [1], "labels": [1], "segment_ids": [2], "teacher_completion": "1"}]
    with pytest.raises(ValueError, match="tokenized need teacher_input_ids"):
        setups.trainer(tmp_path, rows=tokens)
    with pytest.raises(ValueError, match="teacher_prompt without the student's prompt"):
        setups.trainer(tmp_path, rows=[{"text": "1##2", "teacher_prompt": "1="}])
    stream = IterableDataset.from_generator(lambda: iter(LONGER), features=Dataset.from_list(LONGER).features)
    with pytest.raises(ValueError, match="iterable dataset"):
        setups.trainer(tmp_path, rows=stream)
