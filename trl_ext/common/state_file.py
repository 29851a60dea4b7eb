"""A trainer's own state besides its weights, saved in each checkpoint.

`<name>_state.safetensors` holds tensors. `<name>_state.json` holds the settings that must be the same on resume.
"""

import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .saved_weights import CheckpointError, check_finite


def tensors_file(folder: str | Path, name: str) -> Path:
    """The file that holds the tensors of a trainer's state."""
    return Path(folder, f"{name}_state.safetensors")


def save_state(folder: str | Path, name: str, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> None:
    """Write a trainer's state into a checkpoint.

    Args:
        folder: the checkpoint.
        name: name of the method, used for the file names.
        tensors: the state by name, of any shape and dtype.
        settings: JSON values that must be the same on resume.
    """
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tensors_file(folder, name))
    tensors_file(folder, name).with_suffix(".json").write_text(json.dumps(settings, indent=1) + "\n")


def load_state(folder: str | Path, name: str) -> dict[str, torch.Tensor]:
    """The tensors that `save_state` wrote. Call `check_state` first."""
    return load_file(tensors_file(folder, name))


def saved_shapes(folder: str | Path, name: str) -> dict[str, list[int]]:
    """The shapes of a saved state's tensors, by name."""
    with safe_open(tensors_file(folder, name), framework="pt") as tensors:
        return {key: list(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118 - not a dict


def check_state(
    folder: str | Path,
    name: str,
    settings: dict[str, Any],
    why: dict[str, str],
    *,
    infinite: Set[str] = frozenset(),
    unknown: Set[str] = frozenset(),
) -> None:
    """Check that a checkpoint's state is complete and belongs to this run.

    Args:
        folder: the checkpoint.
        name: as for `save_state`.
        settings: the settings of this run, as for `save_state`.
        why: messages for settings whose values mean nothing to a reader, such as hashes.
        infinite: names of tensors that may hold infinity.
        unknown: names of tensors in which NaN has a meaning.

    Raises:
        CheckpointError: names the missing file, the differing setting, or the tensor that is not finite.
    """
    tensors = tensors_file(folder, name)
    plain = tensors.with_suffix(".json")
    for file in (tensors, plain):
        if not file.is_file():
            raise CheckpointError(f"{file} is missing: the checkpoint was not written by a run of {name}")
    saved = json.loads(plain.read_text())
    for key, value in settings.items():
        if not isinstance(saved, dict) or key not in saved:
            raise CheckpointError(f"{plain} has no {key!r}")
        if saved[key] != value:
            changed = f"{plain} has {key}={saved[key]!r}, this run {value!r}"
            raise CheckpointError(f"{folder}: {why[key]}" if key in why else changed)
    check_finite([tensors], buffers=infinite, unknown=unknown)
