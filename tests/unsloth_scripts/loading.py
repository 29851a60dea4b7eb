"""What `grpo.py` saved, loaded in a fresh process, with and without Unsloth: does it say the same?"""

from tests import unsloth_on_cpu  # noqa: F401 - before all else


# isort: split
import json
import sys

import torch
from safetensors.torch import load_file

from tests.unsloth_scripts.fast_forward import difference
from unsloth_ext import FastThinkingModel, backbone_of


if __name__ == "__main__":
    folder = sys.argv[1]
    said = load_file(f"{folder}/said.safetensors")
    report = {}
    for kind in ("adapter", "merged", "unsloth", "lora"):
        for use_unsloth in (True, False):
            model, _ = FastThinkingModel.from_pretrained(
                f"{folder}/{kind}",
                max_seq_length=128,
                dtype=torch.float32,
                load_in_4bit=False,
                device_map="cpu",
                use_unsloth=use_unsloth,
            )
            with torch.no_grad():
                logits = model.eval()(
                    input_ids=said["ids"],
                    thinking_mask=said["mask"],
                    recompute_thinking_projection=True,
                    thinking_hidden_states_cache=said["hidden"],
                ).logits
            trainable = [n for n, p in model.named_parameters() if p.requires_grad and ".thinking_" in n]
            report[f"{kind} {use_unsloth}"] = {
                "difference": difference(logits, said["logits"]),
                "unsloth": getattr(backbone_of(model), "_unsloth_fast_path", False),
                "trainable": len(trainable),
            }
    for use_unsloth in (True, False):
        try:
            FastThinkingModel.from_pretrained(f"{folder}/lost", load_in_4bit=False, use_unsloth=use_unsloth)
        except ValueError as error:
            report[f"lost {use_unsloth}"] = str(error)
    for name in ("runs/missing", "no such/model/at all"):
        try:
            FastThinkingModel.from_pretrained(f"{folder}/{name}", load_in_4bit=False, use_unsloth=True)
        except ValueError as error:
            report[name] = str(error)
    print(json.dumps(report))
