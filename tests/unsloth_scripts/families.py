"""Every family: forwards and decoding under Unsloth against the stock model with the same weights."""

from tests import unsloth_on_cpu  # noqa: F401 - before all else


# isort: split
import json

import torch
from unsloth.models import llama

from tests import tiny
from tests.unsloth_scripts import decoding, fast_forward


if __name__ == "__main__":
    calls = fast_forward.count_calls()
    # Before any other: what is loaded later is found by what earlier loads have left
    report = {"loaded_first": fast_forward.loaded_first(), "forward": {}, "decoding": {}}
    for family in fast_forward.FAMILIES:
        model = fast_forward.load(fast_forward.saved(tiny.model(family)))
        stock = fast_forward.twin(model, family)
        calls.clear()
        report["forward"][family] = fast_forward.compare(family, model, stock) | {"fast_calls": len(calls)}
        with torch.no_grad():
            for source in ("projection", "soft_embedding"):
                report["decoding"][f"{family} {source}"] = decoding.compare(model, stock, source)
    report["checkpointing"] = fast_forward.checkpointing()
    report["undo"] = fast_forward.undo()
    report["function"] = llama.LlamaModel_fast_forward.__name__
    print(json.dumps(report))
