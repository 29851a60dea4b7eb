"""Full models with modules that their class does not know, in a folder or on the hub."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests import tiny
from unsloth_ext import LatentConfig, attach_latent
from unsloth_ext.common import hub
from unsloth_ext.common.settings_file import TENSORS


NAMES = ("latent_projection",)


def full(folder):
    model = attach_latent(tiny.model(), tiny.tokenizer(()), LatentConfig(4, 2, projection_dim=16))
    model.save_pretrained(folder)
    return model


def test_modules_come_from_the_hub_as_from_a_folder(tmp_path, monkeypatch):
    saved = full(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: {"us/model": str(tmp_path)}[name])
    for name in (str(tmp_path), "us/model"):
        fresh = attach_latent(tiny.model(), tiny.tokenizer(()), LatentConfig(4, 2, projection_dim=16))
        for parameter in fresh.model.latent_projection.parameters():
            torch.nn.init.zeros_(parameter)
        hub.load_modules(fresh, name, NAMES, None)
        for ours, theirs in zip(
            fresh.model.latent_projection.parameters(), saved.model.latent_projection.parameters(), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_a_whole_model_loads_and_grows_without_a_word(tmp_path, monkeypatch):
    """transformers would tell of layers that are not sharded over devices, and how it draws new embeddings."""
    full(tmp_path)
    said = []
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler := logging.Handler()])
    handler.emit = said.append
    logging.Logger.warning_once.cache_clear()
    model, tokenizer = hub.load_causal_lm(str(tmp_path), method="latent"), tiny.tokenizer(())
    tokenizer.add_tokens([f"<{i}>" for i in range(1000)])
    hub.fit_embeddings(model, tokenizer)
    assert not said and model.get_input_embeddings().weight.shape[0] == len(tokenizer)


@pytest.mark.parametrize("lost", ["model.norm.weight", "model.latent_projection.1.weight"])
def test_a_tensor_that_is_not_there_is_named(tmp_path, lost):
    model = full(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors[lost]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=lost.removeprefix("model.")):
        hub.load_causal_lm(str(tmp_path), method="latent")
        hub.load_modules(model, str(tmp_path), NAMES, None)


def test_a_methods_own_file_goes_before_what_other_software_wrote(tmp_path):
    """Unsloth's merge rounds to 16 bits, and copies the base's old modules where it had some."""
    model = full(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    own = {name: tensor + 1 for name, tensor in tensors.items() if "latent_projection" in name}
    save_file(own, tmp_path / TENSORS, metadata={"format": "pt"})
    hub.load_modules(model, str(tmp_path), NAMES, None)
    assert own and all(torch.equal(model.state_dict()[name], tensor) for name, tensor in own.items())
