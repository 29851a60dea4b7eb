"""Students that are mixtures of experts: resumed is uninterrupted, to the bit."""

import pytest
import torch

from tests import moe

from . import setups


def logits(folder, **changes):
    return setups.logits(folder, moe.model("minimind3-moe"), **changes)


def reasoning(folder, **changes):
    return setups.reasoning(folder, moe.model("minimind3-moe", vocab_size=50), **changes)


@pytest.mark.parametrize("make", [logits, reasoning])
def test_resumed_is_uninterrupted(tmp_path, make):
    """At step 2 of 4, parameters and figures; where tags were added, the embeddings have grown. The experts learn."""
    changes = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = make(tmp_path, per_device_train_batch_size=2, **changes)
    before = moe.experts(whole.model)
    after = setups.trained(whole)
    again = make(tmp_path, per_device_train_batch_size=2, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    found = setups.weights(again)
    assert found.keys() == after.keys() and [n for n in after if not torch.equal(after[n], found[n])] == []
    assert setups.losses(again)[:4] == setups.losses(whole)[:4] and "aux_loss" in setups.losses(whole)[0]
    assert before and not any(torch.equal(before[name], after[name]) for name in before)
