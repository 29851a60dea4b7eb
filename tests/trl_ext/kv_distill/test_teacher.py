"""Teachers in 4 bits, in their own dtype, and spread over devices or a disk."""

import json

import pytest
import torch

from tests import tiny
from trl_ext import KVDistillConfig

from . import setups
from .test_trainer import batch_of


def saved(folder, dtype=torch.float32):
    """A teacher of widths that NF4's blocks of 64 divide, in a folder."""
    widths = {"hidden_size": 128, "intermediate_size": 128, "head_dim": 32}
    net = setups.teacher(std=0.1, num_attention_heads=4, num_key_value_heads=2, **widths)
    net.to(dtype).save_pretrained(folder / "teacher")
    tiny.tokenizer(()).save_pretrained(folder / "teacher")
    return str(folder / "teacher")


def loss(trainer):
    trainer.model.train()
    return trainer.compute_loss(trainer.model, dict(batch_of(trainer)))


def test_four_bits(tmp_path):
    """NF4, asked for as JSON: the loss is near that of the whole teacher (10%), the student learns, the teacher stays."""
    pytest.importorskip("bitsandbytes")
    folder = saved(tmp_path)
    given = json.dumps(
        {"quantization_config": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "device_map": "cpu"}
    )
    args = KVDistillConfig(**setups.settings(tmp_path, teacher_model_init_kwargs=given))
    assert isinstance(args.teacher_model_init_kwargs, dict)
    whole = loss(setups.trainer(tmp_path, given_teacher=folder))
    trainer = setups.trainer(tmp_path, given_teacher=folder, teacher_model_init_kwargs=given)
    assert trainer.teacher.is_loaded_in_4bit and not any(p.requires_grad for p in trainer.teacher.parameters())
    assert 0 < abs(loss(trainer) - whole) <= 0.1 * whole
    teacher = {n: p.detach().clone() for n, p in trainer.teacher.named_parameters()}
    before = {n: p.detach().clone() for n, p in trainer._named_trained().items()}
    after = setups.trained(trainer)
    assert all(not torch.equal(after[n], before[n]) for n, p in trainer._named_trained().items() if p.requires_grad)
    assert all(torch.equal(p, teacher[n]) for n, p in trainer.teacher.named_parameters())


def test_its_own_dtype(tmp_path):
    """bfloat16 in its folder, bfloat16 in memory; losses to a hundredth."""
    whole = loss(setups.trainer(tmp_path, given_teacher=saved(tmp_path)))
    trainer = setups.trainer(tmp_path, given_teacher=saved(tmp_path, torch.bfloat16))
    assert trainer.teacher.dtype == torch.bfloat16 and trainer.model.dtype == torch.float32
    assert abs(loss(trainer) - whole) <= 0.01 * whole


@pytest.mark.parametrize("place", ["embedding", "first layer", "everything"])
def test_parts_that_are_not_on_the_students_device(tmp_path, place):
    """Weights left on the disk until they are needed, which is how accelerate holds what does not fit: equal losses."""
    folder = saved(tmp_path)
    whole = loss(setups.trainer(tmp_path, given_teacher=folder))
    parts = [
        "model.embed_tokens",
        *(f"model.layers.{i}" for i in range(4)),
        "model.norm",
        "model.rotary_emb",
        "lm_head",
    ]
    on_disk = {"embedding": [parts[0], "lm_head"], "first layer": parts[1:2], "everything": parts}[place]
    given = {
        "device_map": {part: "disk" if part in on_disk else "cpu" for part in parts},
        "offload_folder": str(tmp_path / "offloaded"),
    }
    trainer = setups.trainer(tmp_path, given_teacher=folder, teacher_model_init_kwargs=given)
    assert trainer.teacher.hf_device_map and loss(trainer) == whole == loss(trainer)
    trainer.train()
