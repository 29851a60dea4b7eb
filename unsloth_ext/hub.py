"""What a saved model has beside its base: small files, and modules that its class does not know."""

import json
import logging
import os
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from .residual import backbone_of


def read_json(folder: str, filename: str, token: str | None) -> dict | None:
    """A JSON file of a local folder or a hub repository; None where there is none."""
    path = Path(folder, filename)
    if not os.path.isdir(folder):
        try:
            path = Path(hf_hub_download(folder, filename, token=token))
        except (EntryNotFoundError, OSError, ValueError):
            return None
    return json.loads(path.read_text()) if path.exists() else None


def load_full(name: str, **kwargs: Any) -> PreTrainedModel:
    """A full model that was saved with modules its class does not know. transformers would print a report of them, so it is
    asked instead, and only missing tensors are told.

    Raises:
        ValueError: tensors of the model itself are missing.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs)
    finally:
        logger.setLevel(level)
    if found["missing_keys"]:
        raise ValueError(f"{name} lacks {', '.join(sorted(found['missing_keys']))}")
    return model


def load_modules(model: PreTrainedModel, name: str, names: tuple[str, ...], token: str | None) -> None:
    """Fill submodules of the decoder, in place, from the safetensors files of a full model, a folder or a hub id.

    Raises:
        ValueError: a tensor is missing.
    """
    backbone = backbone_of(model)
    wanted = {k: v for k, v in backbone.state_dict().items() if k.split(".")[0] in names}
    folder = name if os.path.isdir(name) else snapshot_download(name, allow_patterns="*.safetensors", token=token)
    found = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 - not a dict
                short = key.removeprefix(f"{model.base_model_prefix}.")
                if short in wanted:
                    found[short] = tensors.get_tensor(key)
    missing = wanted.keys() - found.keys()
    if missing:
        raise ValueError(f"{name} says that its model thinks, but lacks {', '.join(sorted(missing))}")
    backbone.load_state_dict(found, strict=False)
