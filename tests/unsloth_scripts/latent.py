"""Latent distillation where Unsloth was imported first: on its SFT trainer, and on a model with its fast forwards."""

from tests import unsloth_on_cpu  # noqa: F401 - before all else


# isort: split
import json
import tempfile

import trl

from tests.trl_ext.latent import setups
from tests.unsloth_scripts.refusals import fast_model, refusal
from unsloth_ext import LatentConfig, attach_latent


if __name__ == "__main__":
    trainer = setups.trainer(tempfile.mkdtemp(), family="qwen2", **setups.CASES["kv"])
    trained = setups.trained(trainer)
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    losses = {name: value for name, value in first.items() if name.startswith("loss")}
    print(
        json.dumps(
            {
                "parent": trl.SFTTrainer.__name__,
                "losses": losses,
                "trained": trained,
                "refusals": [
                    refusal(attach_latent, *fast_model(), LatentConfig(2, 1)),
                    refusal(setups.trainer, tempfile.mkdtemp(), model="some/model"),
                ],
            }
        )
    )
