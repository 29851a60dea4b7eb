"""`latent_reasoning.json`: the method and settings of a saved model, in a file beside those of PEFT or transformers.

    {"method": "hrpo", "version": 1, "settings": {...}}

Older folders have the settings in `adapter_config.json` or `config.json`, which are read as well. A full model's
`config.json` still has them too. Settings without the method's tensors, or tensors without settings, are an error.
"""

import json
import logging
import os
import types
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import patches

from .method import Method, attaching_methods
from .model_card import write_model_card


logger = logging.getLogger(__name__)

FILE = "latent_reasoning.json"
TENSORS = "latent_reasoning.safetensors"  # a method's own tensors, if other software wrote the rest
ADAPTER = "adapter_model.safetensors"
VERSION = 1


METHODS = attaching_methods()


# -- writing ------------------------------------------------------------------------------------------------------------


def describe_when_saved(model: nn.Module, backbone: nn.Module) -> None:
    """Make every later save of this model, or of a PEFT model around it, also write `latent_reasoning.json` and a card.

    Args:
        model: the causal LM.
        backbone: its decoder.

    Raises:
        ValueError: the model has the settings of two methods.
    """
    method_of(model.config)
    backbone.describe_saved = types.MethodType(_describe, backbone)
    backbone.complete_saved = types.MethodType(_complete, backbone)
    patches.apply("save_pretrained")
    patches.apply("upload_saved")


def method_of(config: Any) -> tuple[Method | None, Any]:
    """Return the method whose settings a model's configuration holds, and these settings.

    Raises:
        ValueError: it holds the settings of two methods.
    """
    found = [(method, getattr(config, method.key)) for method in METHODS.values() if getattr(config, method.key, None)]
    if len(found) > 1:
        raise ValueError(
            f"the model has the settings of {' and '.join(method.name for method, _ in found)}: a model can have only one "
            "method"
        )
    return found[0] if found else (None, None)


def check_free(model: nn.Module, method: str) -> None:
    """Raise a ValueError if a model has the settings of another method. Call it before modules are attached."""
    there = {key for key in (each.key for each in METHODS.values()) if getattr(model.config, key, None)}
    others = sorted(each.name for each in METHODS.values() if each.key in there and each.name != method)
    if others:
        raise ValueError(
            f"{type(model).__name__} has the settings of {' and '.join(others)}: a model can have only one method; load "
            f"the base again for {method}"
        )


def _describe(
    backbone: nn.Module, model: nn.Module, folder: str | Path, kept_card: str | None = None, repo_id: str | None = None
) -> None:
    """Write settings and card into a folder that `model` was saved to, and into the folder of each further adapter in
    it.
    """
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    method, settings = method_of(bare.config)
    if method is None:
        return
    if model is bare:  # its own files hold all tensors, and would be read after that one
        Path(folder, TENSORS).unlink(missing_ok=True)
        if Path(folder, "adapter_config.json").exists():
            logger.warning(
                f"{folder} also holds an adapter, which every loader would open instead: delete adapter_config.json "
                f"and {ADAPTER} there, or save the whole model in another folder"
            )
    others = [name for name in getattr(model, "peft_config", None) or () if name != "default"]
    content = json.dumps({"method": method.name, "version": VERSION, "settings": settings}, indent=2) + "\n"
    for place in (Path(folder), *(Path(folder, name) for name in others if Path(folder, name).is_dir())):
        (place / FILE).write_text(content)
        write_model_card(place, model, method=method.name, settings=settings, kept=kept_card, repo_id=repo_id)
        kept_card = None


def _complete(backbone: nn.Module, model: nn.Module, folder: str | Path) -> None:
    """Write a method's own tensors, settings and card into a folder with a full model that other software saved."""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    method, settings = method_of(bare.config)
    assert method is not None  # the caller checks it
    tensors = {}
    for name in method.modules:
        module: Any = getattr(backbone, name, None)
        if hasattr(module, "modules_to_save"):  # PEFT's wrapper around the trained one
            module = module.modules_to_save[model.active_adapter]
        for key, tensor in (module.state_dict() if module is not None else {}).items():
            tensors[f"{bare.base_model_prefix}.{name}.{key}"] = tensor.detach().cpu().contiguous()
    config = Path(folder, "config.json")
    config.write_text(json.dumps({**json.loads(config.read_text()), method.key: settings}, indent=2) + "\n")
    _describe(backbone, bare, folder)
    save_file(tensors, Path(folder, TENSORS), metadata={"format": "pt"})


# -- reading ------------------------------------------------------------------------------------------------------------


def read_json(folder: str, filename: str, token: str | None) -> dict | None:
    """Read a JSON object from a file of a local folder or a hub repository; None if there is no such file.

    Raises:
        ValueError: the file holds something else.
    """
    path = Path(folder, filename)
    if not os.path.isdir(folder):
        try:
            path = Path(hf_hub_download(folder, filename, token=token))
        except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
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


@dataclass(frozen=True)
class Saved:
    """What a folder or a hub repository says about its model.

    Attributes:
        name: the folder or hub id.
        adapter: its `adapter_config.json`. None for a full model.
        method: the latent reasoning method. None if there is none.
        settings: the settings of the method.
    """

    name: str
    adapter: dict | None
    method: Method | None
    settings: Any


def read_saved(name: str, expected: str | None = None, token: str | None = None) -> Saved:
    """Read the kind of a saved model from its files.

    Args:
        name: a folder or a hub id.
        expected: the method that the caller can open. None means no method at all.
        token: the access token for the hub.

    Returns:
        The method, settings and adapter of the model.

    Raises:
        ValueError: the model is of another method, or has a method's tensors without its settings.
    """
    adapter = read_json(name, "adapter_config.json", token)
    method, settings = _settings(name, adapter, token)
    held = held_by(tensor_names(name, adapter is not None, token))
    for other, why in ((method, "its settings say so"), (held and held[0], f"it holds {held and held[1]}")):
        if other is not None and other.name != expected:
            raise ValueError(
                f"{name} holds a model of the method {other.name} ({why}), whose modules would be lost here; open it with "
                f"unsloth_ext.{other.loader}.from_pretrained"
            )
    if held and method is None:
        raise ValueError(missing_settings(name, *held))
    return Saved(name, adapter, method, settings)


def saved_method(name: str, token: str | None = None) -> Method | None:
    """Return the method whose modules a saved model has, or the base of a saved adapter; None for a plain model.

    Args:
        name: a folder or a hub id.
        token: the access token for the hub.
    """
    adapter = read_json(name, "adapter_config.json", token)
    method, _ = _settings(name, adapter, token)
    base = (adapter or {}).get("base_model_name_or_path")
    return saved_method(base, token) if method is None and base else method


def missing_settings(name: str, method: Method, tensor: str) -> str:
    """Return the message for tensors of a method whose settings are missing."""
    return (
        f"{name} holds {tensor}, a tensor of the method {method.name}, but no {FILE} with its settings: other "
        f"software has saved the model; copy {FILE} from the original folder"
    )


def _settings(name: str, adapter: dict | None, token: str | None) -> tuple[Method | None, Any]:
    file = read_json(name, FILE, token)
    older = adapter if adapter is not None else read_json(name, "config.json", token) or {}
    there = [(method, older[method.key]) for method in METHODS.values() if older.get(method.key)]
    if file is None:
        return there[0] if there else (None, None)
    if file.get("version") != VERSION or file.get("method") not in METHODS or not file.get("settings"):
        raise ValueError(
            f"{name}: {FILE} has method={file.get('method')!r}, version={file.get('version')!r}; this package reads "
            f"version {VERSION} of {', '.join(METHODS)}, with settings"
        )
    method = METHODS[file["method"]]
    if there and there[0] != (method, file["settings"]):
        raise ValueError(
            f"{name}: {FILE} and {'config.json' if adapter is None else 'adapter_config.json'} hold different settings; "
            f"delete {there[0][0].key!r} from the latter, or make them agree"
        )
    return method, file["settings"]


def tensor_names(name: str, adapter: bool, token: str | None = None) -> list[str]:
    """Return the names of the tensors in the safetensors files of a folder, or in the cached files of a hub repository.

    Raises:
        ValueError: a file is truncated or damaged.
    """
    if os.path.isdir(name):
        files = [Path(name, ADAPTER)] if adapter else [*Path(name).glob("model*.safetensors"), Path(name, TENSORS)]
    else:
        wanted = (ADAPTER,) if adapter else ("model.safetensors", "model.safetensors.index.json", TENSORS)
        files = [Path(file) for file in (_cached(name, file) for file in wanted) if file]
    found: list[str] = []
    for file in files:
        if file.suffix == ".json":
            found += json.loads(file.read_text())["weight_map"]
        elif file.exists():
            found += safetensors_keys(file)
    return found


def _cached(name: str, file: str) -> str | None:
    try:
        found = try_to_load_from_cache(name, file)
    except HFValidationError:
        return None
    return found if isinstance(found, str) else None


def safetensors_keys(path: Path) -> list[str]:
    """Return the names of the tensors in a file. Raise a ValueError if it is truncated or damaged."""
    try:
        with safe_open(path, framework="pt") as tensors:
            return list(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or damaged ({error})") from error


def held_by(names: Iterable[str]) -> tuple[Method, str] | None:
    """Return the method that the first of these tensors belongs to, and its name; None if no tensor belongs to one."""
    for name in names:
        parts = name.split(".")
        for method in METHODS.values():
            if any(module in parts for module in method.modules):
                return method, name
    return None
