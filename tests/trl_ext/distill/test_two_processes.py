"""Two ranks (DDP on gloo) with half the rows each give the figures and weights of one with all of them.

Run as a script it is one of the ranks: FOLDER.
"""

import json
import sys
from pathlib import Path

import pytest
import torch

from tests.processes import launch, leave

from . import setups


# SGD: AdamW would turn the rounding of gradients that should be zero into whole steps
SGD = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0, "gradient_accumulation_steps": 2, "max_steps": 3}
METHODS = {
    "logits": lambda folder, **sizes: setups.logits(folder, alpha=0.3, **SGD, **sizes),
    "reasoning": lambda folder, **sizes: setups.reasoning(folder, peft=True, **SGD, **sizes),
}


def run(method, folder, rows):
    """Writes figures and weights into FOLDER/METHOD."""
    folder = folder / method
    trainer = METHODS[method](folder, per_device_train_batch_size=rows, per_device_eval_batch_size=rows)
    trainer.train()
    evaluated = trainer.evaluate()
    if trainer.is_world_process_zero():
        steps = [{k: v for k, v in e.items() if k.startswith(("loss", "grad"))} for e in trainer.state.log_history]
        weights = [p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]
        torch.save(torch.cat(weights), folder / "weights.pt")
        found = {name: evaluated[name] for name in evaluated if name.startswith("eval_loss/")}
        (folder / "result.json").write_text(json.dumps({"steps": [s for s in steps if "loss" in s], "eval": found}))


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of both methods, run by two processes."""
    folder = tmp_path_factory.mktemp("2")
    launch("tests.trl_ext.distill.test_two_processes", folder, processes=2)
    return folder


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one(tmp_path, together, method):
    """Rows of unequal lengths: every figure of every step to 1e-5 relative, weights to 1e-6."""
    run(method, tmp_path, 4)
    folders = tmp_path / method, together / method
    one, two = (json.loads((folder / "result.json").read_text()) for folder in folders)
    assert len(one["steps"]) == len(two["steps"]) == 3
    for a, b in zip(one["steps"], two["steps"], strict=True):
        assert a.keys() == b.keys() and len(a) == 4
        assert all(b[name] == pytest.approx(a[name], rel=1e-5) for name in a)
    assert one["eval"].keys() == two["eval"].keys() and len(one["eval"]) == 2
    weights = [torch.load(folder / "weights.pt", weights_only=True) for folder in folders]
    assert (weights[0] - weights[1]).abs().max() <= 1e-6


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in METHODS:
        run(name, Path(sys.argv[1]), 2)
    leave()
