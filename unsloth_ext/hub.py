"""What a saved model has beside its base: small files, and modules that its class does not know."""

import json
import logging
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from .residual import backbone_of


ADAPTER = "adapter_model.safetensors"


def read_json(folder: str, filename: str, token: str | None) -> dict | None:
    """A JSON object in a file of a local folder or a hub repository; None where there is none.

    Raises:
        ValueError: the file holds something else.
    """
    path = Path(folder, filename)
    if not os.path.isdir(folder):
        try:
            path = Path(hf_hub_download(folder, filename, token=token))
        except (EntryNotFoundError, OSError, ValueError):
            return None
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object")
    return found


def base_of(adapter: dict, name: str) -> str:
    """What the `adapter_config.json` of `name` says is its base.

    Raises:
        ValueError: nothing, or a folder that is not there.
    """
    base = adapter.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise ValueError(f"{name}: adapter_config.json has no base_model_name_or_path")
    if not os.path.isdir(base):
        try:
            validate_repo_id(base)
        except HFValidationError as error:
            raise ValueError(
                f"{name}: its base_model_name_or_path {base} is not there (from {os.getcwd()}); correct it in "
                "adapter_config.json"
            ) from error
    return base


def load_full(name: str, **kwargs: Any) -> PreTrainedModel:
    """A full model that was saved with modules its class does not know. transformers would print a report of them, so it is
    asked instead, and only missing tensors are told.

    Raises:
        ValueError: tensors of the model itself are missing, not finite, or their file is damaged.
    """
    logger = logging.getLogger("transformers.modeling_utils")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        model, found = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"{name}: its safetensors are truncated or damaged ({error})") from error
    finally:
        logger.setLevel(level)
    if found["missing_keys"]:
        raise ValueError(f"{name} lacks {', '.join(sorted(found['missing_keys']))}")
    check_finite(dict(model.named_parameters()), name)
    return model


def check_finite(tensors: dict[str, torch.Tensor], name: str) -> None:
    """Raises a ValueError that names a tensor of `name` with NaN or infinity in it."""
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name}: {key} holds NaN or infinity")


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
    check_finite(found, name)
    backbone.load_state_dict(found, strict=False)


def load_adapter(model: nn.Module, name: str, **kwargs: Any) -> PeftModel:
    """`PeftModel.from_pretrained`, without its warning that it does not know the fields `ThinkingLoraConfig` adds, and with
    every tensor of the adapter there.

    Raises:
        ValueError: the adapter's file is missing or damaged, or lacks tensors; NaN is in it.
    """
    saved = adapter_keys(name, kwargs.get("token"))
    with warnings.catch_warnings():
        ours = r"('concepts'|'latent'|'planner'|'thinking'|, )+"
        warnings.filterwarnings("ignore", message=rf"Unexpected keyword arguments \[{ours}\]")
        try:
            loaded = PeftModel.from_pretrained(model, name, **kwargs)
        except KeyError as error:  # of tensors that PEFT looks up by name
            raise ValueError(f"{name}: {ADAPTER} lacks {error}") from error
        except RuntimeError as error:  # of shapes
            raise ValueError(f"{name}: {ADAPTER} is of another model: {error}") from error
    wanted = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    missing = sorted(wanted.keys() - saved)
    if missing:
        raise ValueError(
            f"{name}: {ADAPTER} lacks {missing[0]}" + (f" and {len(missing) - 1} more" * (len(missing) > 1))
        )
    check_finite(wanted, name)
    return loaded


def adapter_keys(name: str, token: str | None) -> set[str]:
    """Names of the tensors in the file of an adapter folder or hub repository.

    Raises:
        ValueError: see `load_adapter`.
    """
    path = Path(name, ADAPTER) if os.path.isdir(name) else Path(hf_hub_download(name, ADAPTER, token=token))
    if not path.exists():
        raise ValueError(f"{path} is missing")
    try:
        with safe_open(path, framework="pt") as tensors:
            return set(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error})") from error
