"""Saved models of every kind, random, whose trained weights have moved."""

from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.unsloth_ext.common.test_saved import KINDS, made
from unsloth_ext.common.wrapping import backbone_of


ALL = [*KINDS, ("plain", True), ("plain", False)]


def saved(method: str, peft: bool, root: Path) -> Path:
    """The folder of a model of a method, or "plain", with an adapter or without."""
    if method == "plain":
        model, tokenizer = tiny.model(), tiny.tokenizer()
        model.save_pretrained(root / "base")
        tokenizer.save_pretrained(root / "base")
        if peft:
            model = AutoModelForCausalLM.from_pretrained(root / "base")
            model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
            torch.manual_seed(1)
            for name, weight in model.named_parameters():
                if "lora_B" in name:
                    weight.data.normal_()
    else:
        model, tokenizer = made(method, peft, root)
        if method == "hrpo":
            tiny.loud_gates(backbone_of(model))
    model.save_pretrained(root / "saved")
    tokenizer.save_pretrained(root / "saved")
    return root / "saved"
