"""Trainers on FSDP2, with TRL's own file, against DDP."""

import json

import pytest
import torch

from tests.trl_ext.distill import setups as distill
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv

from .launch import launch


CLOSE = {"rtol": 1e-3, "atol": 3e-4}  # float32; sums in another order, through three steps of AdamW of 1e-3 each


@pytest.mark.parametrize(
    "case",
    [
        "hrpo",
        "hrpo, LoRA",
        "hrpo, projection, two_pass",
        "hrpo, soft_embedding, rollout",
        "hrpo, reference model",
        "latent, sequential",
        "latent, kv",
        "logits",
        "kv, closed form",
        "concept",
    ],
)
def test_the_weights_are_those_of_ddp(tmp_path, case):
    hrpo.base_folder(tmp_path)
    distill.teacher().save_pretrained(tmp_path / "teacher")
    kv.teacher().save_pretrained(tmp_path / "kv_teacher")
    found = {}
    for engine in ("ddp", "fsdp2"):
        launch(engine, case, tmp_path)
        found[engine] = [json.loads((tmp_path / f"{engine}{rank}.json").read_text()) for rank in range(2)]
    for one, other in zip(found["ddp"][0]["logs"], found["fsdp2"][0]["logs"], strict=True):
        assert one == pytest.approx(other, rel=1e-3, abs=1e-4)
    lengths = [rank["lengths"] for rank in found["fsdp2"]]
    assert lengths[0] == lengths[1] == [] or lengths[0] != lengths[1]  # no process waits for the longest completion
    texts = [rank["texts"] for ranks in found.values() for rank in ranks]
    assert texts == 4 * texts[:1] and (any(texts[0]) or case == "concept")
    weights, ours = (torch.load(tmp_path / f"{engine}0.pt") for engine in found)
    assert weights.keys() == ours.keys()
    for name, value in weights.items():
        torch.testing.assert_close(ours[name], value, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")
