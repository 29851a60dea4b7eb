"""Preparing rows must not read the model: `datasets` would serialise and hash the whole of it for each step."""

import pytest
import torch
from datasets import Dataset
from torch import nn

from .trainers import CASES


@pytest.mark.parametrize("case", [case for case in CASES if case.rows], ids=lambda case: case.name)
def test_what_rows_are_hashed_with_has_no_weights(tmp_path, case):
    """The fingerprint of the prepared rows, under which they are cached, is that of another model's."""
    rows, found = Dataset.from_list(case.rows), []
    for seed in (1, 2):
        model = case.model()
        torch.manual_seed(seed)
        nn.init.normal_(model.get_input_embeddings().weight)
        found.append(case.make(tmp_path / str(seed), model=model, train_dataset=rows).train_dataset._fingerprint)
    assert found[0] == found[1]
