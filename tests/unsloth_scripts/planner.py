"""Planner and executor where Unsloth was imported first: on its SFT trainer, and on a model with its fast forwards."""

from tests import unsloth_on_cpu  # noqa: F401 - before all else


# isort: split
import json
import tempfile

import torch
import trl

from tests.trl_ext.planner import setups
from tests.unsloth_scripts.refusals import fast_model, refusal


# The latter draws nothing: its one candidate is the greedy plan
TRAININGS = {"soft": {"target_length": 1.5}, "hard_em": {"training": "hard_em", "num_candidates": 0, "z_dropout": 0.0}}


def train(case: str) -> dict:
    trainer = setups.trainer(tempfile.mkdtemp(), peft=True, **TRAININGS[case])
    before = setups.weights(trainer)
    trainer.train()
    after = setups.weights(trainer)
    first = next(entry for entry in trainer.state.log_history if "loss/executor" in entry)
    return {
        "losses": {name: value for name, value in first.items() if name.startswith(("planner/", "loss", "em/"))},
        "trained": sorted(name for name in after if not torch.equal(after[name], before[name])),
    }


def main() -> dict:
    trainers = lambda **given: setups.trainer(tempfile.mkdtemp(), **given)  # noqa: E731
    return {
        "parent": trl.SFTTrainer.__name__,
        **{case: train(case) for case in TRAININGS},
        "fast": refusal(trainers, model=fast_model()[0]),
        "name": refusal(trainers, model="some/model"),
    }


if __name__ == "__main__":
    print(json.dumps(main()))
