"""Where TRL would compute the loss in another way than through the trained tokens' scores, it is refused."""

import functools
from types import SimpleNamespace

import pytest
import trl

from . import setups


TRAINERS = [setups.logits, setups.reasoning]


@pytest.mark.parametrize("make", TRAINERS)
def test_a_loss_of_ones_own(tmp_path, make):
    with pytest.raises(ValueError, match="compute_loss_func"):
        make(tmp_path, given={"compute_loss_func": lambda *_, **__: 0})
    sft = setups.logits(tmp_path, alpha=1.0, given={"compute_loss_func": lambda *_, **__: 0})
    assert sft.compute_loss_func is not None


@pytest.mark.parametrize("split", ["cp_enabled", "sp_enabled"])
@pytest.mark.parametrize("make", TRAINERS)
def test_parallel_sequences(tmp_path, make, split, monkeypatch):
    """What accelerate would say with several processes, which are not here: the parent has made no more than this."""
    parallel = SimpleNamespace(**{"cp_enabled": False, "sp_enabled": False, split: True})

    def made(self, model, args, *_, **__):
        self.accelerator = SimpleNamespace(parallelism_config=parallel, unwrap_model=lambda model: model)
        self.args, self.compute_loss_func = args, None
        self.model, self.train_dataset, self.eval_dataset = model, None, None

    monkeypatch.setattr(trl.SFTTrainer, "__init__", functools.wraps(trl.SFTTrainer.__init__)(made))
    with pytest.raises(ValueError, match="cp_size"):
        make(tmp_path)


@pytest.mark.parametrize("make", TRAINERS)
def test_unsloths_trainer(tmp_path, make, monkeypatch):
    monkeypatch.setattr(trl, "SFTTrainer", type("UnslothSFTTrainer", (trl.SFTTrainer,), {}))
    with pytest.raises(ValueError, match="Unsloth's trainer"):
        make(tmp_path)
