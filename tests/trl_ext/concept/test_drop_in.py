"""What one expects of an SFTTrainer: callbacks, metrics of one's own, pushing, several evaluation sets, the constructor."""

import inspect

import pytest
from datasets import Dataset
from trl import SFTTrainer

from tests import tiny
from trl_ext import ConceptConfig, ConceptTrainer

from . import setups


def test_the_constructor_is_sfttrainers(tmp_path, monkeypatch):
    """Arguments by position, and a configuration of one's own where none is given."""
    monkeypatch.chdir(tmp_path)
    rows, tokenizer = Dataset.from_list(setups.ROWS), tiny.tokenizer(())
    args = ConceptConfig(output_dir="a", use_cpu=True, bf16=False, **setups.SPLIT)
    trainer = ConceptTrainer(setups.base(), args, None, rows, rows, tokenizer)
    assert len(trainer.train_dataset) == len(trainer.eval_dataset) == len(rows)
    ours = inspect.signature(ConceptTrainer.__init__).parameters.values()
    assert not {p.name for p in ours if p.kind == p.KEYWORD_ONLY}
    with pytest.raises(ValueError, match="need a ConceptConfig"):
        ConceptTrainer(setups.base(), setups.lora(), train_dataset=rows)
    assert issubclass(ConceptTrainer, SFTTrainer)
