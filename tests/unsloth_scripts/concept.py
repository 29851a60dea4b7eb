"""Concept tokens where Unsloth was imported first: on its SFT trainer, and on a model with its fast forwards."""

from tests import unsloth_on_cpu  # noqa: F401 - before all else


# isort: split
import json
import tempfile

import torch
import trl

from tests.trl_ext.concept import setups
from tests.unsloth_scripts.refusals import fast_model, refusal


CASE = setups.CASES["autoregressive"]


def main() -> dict:
    trainer = setups.trainer(tempfile.mkdtemp(), peft=True, family="qwen2", **CASE)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    after = setups.trained(trainer)
    first = next(entry for entry in trainer.state.log_history if "loss/ce" in entry)
    trainers = lambda **given: setups.trainer(tempfile.mkdtemp(), family="qwen2", **given)  # noqa: E731
    return {
        "parent": trl.SFTTrainer.__name__,
        "losses": {name: value for name, value in first.items() if name.startswith(("concept/", "loss"))},
        "trained": sorted(name for name in after if not torch.equal(after[name], before[name])),
        "fast": refusal(trainers, model=fast_model(setups.base("qwen2"))[0]),
        "name": refusal(trainers, model="some/model"),
    }


if __name__ == "__main__":
    print(json.dumps(main()))
