"""Latent distillation where Unsloth was imported first: on its SFT trainer, and on a model with its fast forwards."""

from tests import unsloth_on_cpu  # noqa: F401 - before all else


# isort: split
import json
import tempfile

import torch
import trl
from unsloth import FastLanguageModel

from tests import tiny
from tests.trl_ext.latent import setups
from unsloth_ext import LatentConfig, attach_latent


def refusal() -> str:
    folder = tempfile.mkdtemp()
    tiny.model("qwen2").save_pretrained(folder)
    tiny.tokenizer(()).save_pretrained(folder)
    model, tokenizer = FastLanguageModel.from_pretrained(folder, 128, torch.float32, load_in_4bit=False)
    try:
        attach_latent(model, tokenizer, LatentConfig(2, 1))
    except ValueError as error:
        return str(error)
    return ""


def no_names() -> str:
    try:
        setups.trainer(tempfile.mkdtemp(), model="some/model")
    except ValueError as error:
        return str(error)
    return ""


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
                "refusals": [refusal(), no_names()],
            }
        )
    )
