"""What `tests/test_hub.py` runs in a process of its own, whose `HF_ENDPOINT` is a hub on this machine.

    python -m tests.hub_script FOLDER

Prints a JSON object: by kind, what was written by the model before it was pushed and after it was opened by its hub id.
"""

import json
import sys
from pathlib import Path

import torch

from tests.kinds import ALL, saved
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv
from trl_ext.evaluation import command
from unsloth_ext.common.text_model import TextModel


def texts(opened: TextModel) -> list[list[int]]:
    torch.manual_seed(0)
    batch = opened.tokenize(["1+2=", "13+4+5="])
    return opened.complete(batch["input_ids"], batch["attention_mask"], max_new_tokens=6).tokens.tolist()


def main() -> None:
    root, found = Path(sys.argv[1]), {}
    for method, peft in ALL:
        kind = f"{method}-{'adapter' if peft else 'whole'}"
        folder = root / kind
        folder.mkdir()
        opened = TextModel.from_pretrained(str(saved(method, peft, folder)))
        opened.model.push_to_hub(f"us/{kind}")
        opened.tokenizer.push_to_hub(f"us/{kind}")
        again = TextModel.from_pretrained(f"us/{kind}")
        found[kind] = {"kind": again.kind, "before": texts(opened), "after": texts(again)}
    command.main(["us/hrpo-adapter", "--held_out", "2", "--max_new_tokens", "4", "--output", str(root)])
    found["evaluated"] = json.loads((root / "eval.json").read_text())["results"][0]["n"]
    trainer = hrpo.hrpo(root, max_steps=1, hub_model_id="us/trained", push_to_hub=True, save_strategy="no")
    trainer.train()
    trainer.push_to_hub(dataset_name="sums")
    opened = TextModel.from_pretrained("us/trained")
    found["trained"] = {"kind": opened.kind, "delimiter": opened.delimiter}
    ordinary = kv.trainer(root / "kv", max_steps=1, hub_model_id="us/ordinary", push_to_hub=True, hub_strategy="end")
    ordinary.train()
    ordinary.push_to_hub()
    found["ordinary"] = TextModel.from_pretrained("us/ordinary").kind
    try:
        TextModel.from_pretrained("us/nowhere")
    except ValueError as error:
        found["missing"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
