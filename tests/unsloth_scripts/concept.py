"""Concept tokens where Unsloth was imported first: on its SFT trainer, and on a model with its fast forwards."""

from tests import unsloth_on_cpu  # noqa: F401 - before all else


# isort: split
import json
import tempfile

import torch
import trl
from unsloth import FastLanguageModel

from tests import tiny
from tests.trl_ext.concept import setups


CASE = setups.CASES["autoregressive"]


def refusal(**changes) -> str:
    try:
        setups.trainer(tempfile.mkdtemp(), family="qwen2", **changes)
    except ValueError as error:
        return str(error)
    return ""


def fast_model():
    folder = tempfile.mkdtemp()
    setups.base("qwen2").save_pretrained(folder)
    tiny.tokenizer(()).save_pretrained(folder)
    return FastLanguageModel.from_pretrained(folder, 128, torch.float32, load_in_4bit=False)[0]


def main() -> dict:
    trainer = setups.trainer(tempfile.mkdtemp(), peft=True, family="qwen2", **CASE)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    after = setups.trained(trainer)
    first = next(entry for entry in trainer.state.log_history if "loss/ce" in entry)
    return {
        "parent": trl.SFTTrainer.__name__,
        "losses": {name: value for name, value in first.items() if name.startswith(("concept/", "loss"))},
        "trained": sorted(name for name in after if not torch.equal(after[name], before[name])),
        "fast": refusal(model=fast_model()),
        "name": refusal(model="some/model"),
    }


if __name__ == "__main__":
    print(json.dumps(main()))
