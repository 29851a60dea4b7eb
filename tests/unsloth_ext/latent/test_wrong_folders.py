"""Folders of models that are damaged or incomplete: `LatentModel.from_pretrained` says what is wrong with which."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests import tiny
from unsloth_ext import LatentConfig, LatentModel, attach_latent, with_latent_modules
from unsloth_ext.latent.config import remember_latent


A, C, M = "adapter_model.safetensors", "adapter_config.json", "model.safetensors"
S = "latent_reasoning.json"
KEEP_NONE = {"iterations", "projection_dim"}


def saved(folder, peft=True):
    """A folder that `LatentModel` can load."""
    base, tokenizer = tiny.model("qwen3"), tiny.tokenizer(())
    base.save_pretrained(folder / "base")
    base.name_or_path = base.config._name_or_path = str(folder / "base")
    model = attach_latent(base, tokenizer, LatentConfig(4, 2, projection_dim=16))
    if peft:
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        vars(lora).update(with_latent_modules(lora, base))
        model = get_peft_model(base, lora)
        remember_latent(model)
    LatentModel(model, tokenizer).save_pretrained(folder / "saved")
    return folder / "saved"


def edit_json(file, change):
    found = json.loads(file.read_text())
    change(found)
    file.write_text(json.dumps(found))


def edit_tensors(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def lose(part):
    return lambda tensors: tensors.pop(next(name for name in tensors if part in name))


def halve(tensors):
    name = next(name for name in tensors if "latent_projection" in name and tensors[name].dim() > 1)
    tensors[name] = tensors[name][:3]


def spoil(tensors):
    next(iter(tensors.values())).view(-1)[0] = torch.nan


WRONG = {
    "lora": (True, "adapter_model.safetensors lacks .*lora_", lambda f: edit_tensors(f / A, lose("lora_A"))),
    "projection": (True, "adapter_model.safetensors lacks", lambda f: edit_tensors(f / A, lose("latent_projection"))),
    "tokens": (True, "adapter_model.safetensors lacks", lambda f: edit_tensors(f / A, lose("trainable_tokens"))),
    "shape": (True, "does not fit the model", lambda f: edit_tensors(f / A, halve)),
    "adapter": (True, "adapter_model.safetensors is missing", lambda f: (f / A).unlink()),
    "cut": (True, "adapter_model.safetensors is truncated", lambda f: (f / A).write_bytes((f / A).read_bytes()[:999])),
    "nan": (True, "holds NaN or infinity", lambda f: edit_tensors(f / A, spoil)),
    "json": (True, "adapter_config.json is not JSON", lambda f: (f / C).write_text("{")),
    "empty": (True, "has peft_type=None", lambda f: (f / C).write_text("{}")),
    "no tokenizer": (True, "no tokenizer_config.json", lambda f: (f / "tokenizer_config.json").unlink()),
    "list": (True, "adapter_config.json holds no JSON object", lambda f: (f / C).write_text("[]")),
    "no base": (True, "no base_model_name", lambda f: edit_json(f / C, lambda c: c.pop("base_model_name_or_path"))),
    "base gone": (
        True,
        "base_model_name_or_path .* does not exist",
        lambda f: (f.parent / "base").rename(f.parent / "b"),
    ),
    "relative": (
        True,
        "base_model_name_or_path a/b/c does not exist",
        lambda f: edit_json(f / C, lambda c: c.update(base_model_name_or_path="a/b/c")),
    ),
    "no ids": (True, "not those of this version: token_ids", lambda f: edit_latent(f / S, token_ids=None)),
    "more": (True, "not those of this version: depth", lambda f: edit_latent(f / S, depth=3)),
    "text": (True, "num_latents='4'", lambda f: edit_latent(f / S, num_latents="4")),
    "full": (False, "lacks .*q_proj", lambda f: edit_tensors(f / "model.safetensors", lose("q_proj"))),
    "full projection": (False, "lacks latent_projection", lambda f: edit_tensors(f / M, lose("latent_projection"))),
    "full nan": (False, "holds NaN or infinity", lambda f: edit_tensors(f / M, spoil)),
    "full cut": (False, "truncated or damaged", lambda f: (f / M).write_bytes((f / M).read_bytes()[:999])),
}


def edit_latent(file, **changes):
    def change(config):
        kept = {**config["settings"], **changes}
        config["settings"] = {k: v for k, v in kept.items() if v is not None or k in KEEP_NONE}

    edit_json(file, change)


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_with_a_folder_is_named(tmp_path, wrong):
    peft, message, spoil = WRONG[wrong]
    folder = saved(tmp_path, peft)
    LatentModel.from_pretrained(str(folder))
    spoil(folder)
    with pytest.raises(ValueError, match=message) as error:
        LatentModel.from_pretrained(str(folder))
    assert str(folder) in str(error.value)
