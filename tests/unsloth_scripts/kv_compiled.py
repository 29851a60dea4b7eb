"""KV distillation of a stock model whose layers Unsloth compiles whole, as on a GPU after LoRA on one such model."""

import os


os.environ["ON_CPU_COMPILE"] = "1"
from tests import unsloth_on_cpu  # noqa: F401 - before all else


# isort: split
import json
import tempfile
from unittest import mock

import patches
from tests import tiny
from tests.trl_ext.kv_distill import setups


def main() -> dict:
    from unsloth.models._block_compile import patch_block_compile

    with mock.patch("torch.cuda.is_available", lambda: True):  # without a GPU it would not
        wrapped = patch_block_compile(tiny.model("qwen2"))
    trainer = setups.trainer(tempfile.mkdtemp(), peft=True, family="qwen2", gradient_checkpointing=True)
    setups.trained(trainer)
    status = patches.status()["unsloth_block_compile"]
    layers = [module for module in trainer.model.modules() if type(module).__name__ in wrapped]
    modes = {layer.__dict__["_unsloth_block_mode"] for layer in layers}
    patches.revert("unsloth_block_compile")
    modes_after = {layer.__dict__.get("_unsloth_block_mode") for layer in layers}
    first = next(entry for entry in trainer.state.log_history if "kv/loss" in entry)
    return {
        "wrapped": wrapped,
        "off": status.live and status.applied >= len(layers) > 0 and modes == {0},
        "reverted": modes_after == {None},
        "losses": {n: v for n, v in first.items() if n.startswith(("kv/", "loss", "grad_norm"))},
    }


if __name__ == "__main__":
    print(json.dumps(main()))
