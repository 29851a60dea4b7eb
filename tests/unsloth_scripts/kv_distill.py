"""KV distillation where Unsloth was imported first: on its SFT trainer, and on a model with its fast forwards."""

from tests import unsloth_on_cpu  # noqa: F401 - before all else


# isort: split
import json
import tempfile

import torch
import trl

from tests.trl_ext.kv_distill import setups
from tests.unsloth_scripts.refusals import fast_model, refusal


def main() -> dict:
    trainer = setups.trainer(tempfile.mkdtemp(), peft=True, family="qwen2")
    before = {n: p.detach().clone() for n, p in trainer._named_trained().items()}
    after = setups.trained(trainer)
    first = next(entry for entry in trainer.state.log_history if "kv/loss" in entry)
    fast, _ = fast_model()
    trainers = lambda **given: setups.trainer(tempfile.mkdtemp(), family="qwen2", **given)  # noqa: E731
    return {
        "parent": trl.SFTTrainer.__name__,
        "losses": {name: value for name, value in first.items() if name.startswith(("kv/", "loss"))},
        "trained": sorted(name for name in after if not torch.equal(after[name], before[name])),
        "fast": [refusal(trainers, model=fast), refusal(trainers, given_teacher=fast)],
        "name": refusal(trainers, model="some/model"),
    }


if __name__ == "__main__":
    print(json.dumps(main()))
