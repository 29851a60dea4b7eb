"""Comparison of a model's tensors in a folder and in memory: names, shapes, finite values, and equality after loading.

No list says which modules belong to a method. Everything in the state dict of a model or an adapter must be in the
folder.
"""

import copy
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Set
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.utils import logging

from unsloth_ext.common.settings_file import FILE, held_by, method_of, read_json


logger = logging.get_logger(__name__)

ADAPTER = "adapter_model.safetensors"
SCALE = ("lora_alpha", "use_rslora", "alpha_pattern")  # settings of an adapter that its tensors do not show
Tensors = dict[str, torch.Tensor]


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete, of another model, or holds pickles that the user has not allowed."""


def check_weights(model: nn.Module, folder: Path) -> None:
    """Check that `folder` holds exactly the tensors of `model`, with the same shapes and finite values.

    Raises:
        CheckpointError: names the tensor, file or adapter that is missing, different or not finite.
    """
    if is_converted(model):
        files, _ = _full(model, folder)
        converted(model, folder, device_map="meta")
        check_finite(files, {name for name, _ in model.named_buffers()})
        return
    for files, memory in _parts(model, folder):
        _check_names(files, memory, model, folder)
        check_finite(files, {name for name, _ in model.named_buffers()})


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load what `save_pretrained` wrote for `model`, in place, and check that memory equals the files.

    All adapters of a `PeftModel` are loaded. The active adapter and the trainable parameters do not change.

    Raises:
        CheckpointError: a tensor in memory differs from its file.
    """
    if is_converted(model):
        state = converted(model, folder)
        model.load_state_dict(state)
        _check_equal(state.items(), model.state_dict(), folder)
        return
    if isinstance(model, PeftModel):
        for name in model.peft_config:
            set_peft_model_state_dict(model, load_file(_adapter_file(folder, name)), adapter_name=name)
    else:
        for file in _full(model, folder)[0]:
            model.load_state_dict(load_file(file), strict=False)
    for files, memory in _parts(model, folder):
        _check_equal(((name, tensor) for file in files for name, tensor in _tensors(file)), memory, folder)


def warn_of_another_origin(model: nn.Module, folder: Path) -> None:
    """Warn if the weights of `folder` were trained in another setting than `model`, although names and shapes match.

    That is an adapter on another base model or with another scale, or a method with other settings.
    """
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    for name, config in model.peft_config.items() if isinstance(model, PeftModel) else ():
        file = _adapter_file(folder, name).with_name("adapter_config.json")
        saved = read_json(str(file.parent), file.name, None) or {}
        _tell_of_changes(file.parent, saved, {key: getattr(config, key, None) for key in SCALE})
        there, here = saved.get("base_model_name_or_path"), config.base_model_name_or_path
        if there and here and Path(there).resolve() != Path(here).resolve():
            logger.warning(
                f"The adapter in {file.parent} was trained on {there}, but this model is {here}: unless they have the same "
                "weights, it does not belong to it"
            )
    settings = json.loads(json.dumps(method_of(getattr(bare, "config", None))[1])) or {}
    _tell_of_changes(folder, (read_json(str(folder), FILE, None) or {}).get("settings") or {}, settings)


def _tell_of_changes(folder: Path, before: dict, settings: dict) -> None:
    differing = [key for key in settings if key in before and settings[key] != before[key]]
    if differing:
        changes = ", ".join(f"{key}={settings[key]!r} (before: {before[key]!r})" for key in differing)
        logger.warning(f"{folder} was trained with other settings than this model has now: {changes}")


def check_finite(files: list[Path], buffers: Set[str] = frozenset(), unknown: Set[str] = frozenset()) -> None:
    """Raise a CheckpointError that names a tensor with NaN or infinity.

    Args:
        files: safetensors files.
        buffers: names of tensors that may hold infinity.
        unknown: names of tensors in which NaN has a meaning.
    """
    for file in files:
        for name, tensor in _tensors(file):
            if not tensor.is_floating_point() or name in unknown:
                continue
            if tensor.isnan().any() if name in buffers else not tensor.isfinite().all():
                raise CheckpointError(
                    f"{file}: {name} holds NaN or infinity: the run has diverged; resume from an earlier checkpoint"
                )


def checksum(model: nn.Module) -> str:
    """A hash of a model's names, shapes and values. It is the same on any device."""
    sums = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        total = tensor.detach().reshape(-1).view(torch.uint8).sum(dtype=torch.int64).item()
        sums.update(f"{name} {tuple(tensor.shape)} {tensor.dtype} {total}\n".encode())
    return sums.hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a full model, or of a module beside one, whose file has the name of its folder."""
    return sorted([*folder.glob("model*.safetensors"), *folder.glob(f"{folder.name}.safetensors")])


def is_converted(model: nn.Module) -> bool:
    """Whether transformers saves a full model in another form than it has in memory, such as experts one by one."""
    return isinstance(model, PreTrainedModel) and bool(get_model_conversion_mapping(model, add_legacy=False))


def converted(model: PreTrainedModel, folder: Path, device_map: str | None = None) -> Tensors:
    """The folder's tensors under this model's names.

    Args:
        model: the model whose names and configuration are used.
        folder: where the model was saved.
        device_map: "meta" reads shapes only.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape.
    """
    files, ours = _full(model, folder)
    dtype = functools.reduce(torch.promote_types, {p.dtype for p in model.parameters()})
    try:
        found, info = type(model).from_pretrained(
            folder,
            config=copy.deepcopy(model.config),
            dtype=dtype,
            device_map=device_map,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
    except RuntimeError as error:
        raise CheckpointError(f"{folder} is of another model, or damaged: {error}") from error
    state = found.state_dict()
    attached = ours.keys() - state.keys()  # attached modules, which the model's class does not have
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            state |= {name: tensors.get_tensor(name) for name in attached & set(tensors.keys())}
    differing = [(n, state[n].shape, ours[n].shape) for n in attached & state.keys() if state[n].shape != ours[n].shape]
    for name, theirs, here in sorted([*info["mismatched_keys"], *differing]):
        raise CheckpointError(
            f"{folder} is of another model: it has {name} {tuple(theirs)}, this one has {tuple(here)}"
        )
    for name in sorted(info["unexpected_keys"] - ours.keys()):
        raise CheckpointError(f"{folder} is of another model: it has {name}, this one has no such tensor")
    for name in sorted(info["missing_keys"] | (attached - state.keys())):
        raise CheckpointError(f"{folder} has no {name}: {_lost(name)}")
    return state


def _parts(model: nn.Module, folder: Path) -> list[tuple[list[Path], Tensors]]:
    """Pairs of files and the tensors in memory that belong to them: one per adapter, or one for the whole model."""
    if not isinstance(model, PeftModel):
        return [_full(model, folder)]
    for file in sorted(folder.glob(f"*/{ADAPTER}")):
        if file.parent.name not in model.peft_config:
            raise CheckpointError(
                f"{folder} holds an adapter {file.parent.name!r}, which this model lacks (it has "
                f"{', '.join(model.peft_config)}): {_OTHER_KIND}"
            )
    parts = []
    for name in model.peft_config:
        file = _adapter_file(folder, name)
        if not file.exists():
            lost = "" if name == "default" else f", the model's adapter {name!r}: {_OTHER_KIND}"
            raise CheckpointError(f"{file} is missing" + (lost or ": the checkpoint is not one of this kind of model"))
        # `remember_latent` has bound arguments of save_pretrained: PEFT alone would also save a resized embedding
        how = getattr(model.save_pretrained, "keywords", {})
        parts.append(([file], get_peft_model_state_dict(model, adapter_name=name, **how)))
    return parts


_OTHER_KIND = (
    "resume with the model that the run started with (a PeftModel, or a plain model with peft_config) and, if 'ref' is the "
    "reference of beta > 0, with beta > 0"
)


def _full(model: nn.Module, folder: Path) -> tuple[list[Path], Tensors]:
    files = weight_files(folder)
    if not files:  # from_pretrained would take an adapter's base instead
        raise CheckpointError(f"{folder}/model.safetensors is missing: this is a whole model, and needs one")
    return files, model.state_dict()


def _adapter_file(folder: Path, name: str) -> Path:
    """Where PEFT saves an adapter: "default" in the folder itself, each other one in its own sub-folder."""
    return folder / ADAPTER if name == "default" else folder / name / ADAPTER


def _check_names(files: list[Path], memory: Tensors, model: nn.Module, folder: Path) -> None:
    saved: dict[str, tuple[int, ...]] = {}
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            saved |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    for name, shape in saved.items():
        here = tuple(memory[name].shape) if name in memory else "no such tensor"
        if here != shape:
            raise CheckpointError(f"{folder} is of another model: it has {name} {shape}, this one has {here}")
    # A full model saves tied tensors under one name
    kept = {_place(memory[name]) for name in saved}
    unsaved = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_save", None) or ()]
    for name, tensor in memory.items():
        if name not in saved and _place(tensor) not in kept and not any(p.search(name) for p in unsaved):
            raise CheckpointError(f"{folder} has no {name}: {_lost(name)}")


def _place(tensor: torch.Tensor) -> tuple:
    return tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.device


def _lost(name: str) -> str:
    held = held_by([name])
    return f"it was saved by {f'a model without {held[0].what}' if held else 'another model, or it is damaged'}"


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            yield name, tensors.get_tensor(name)


def _check_equal(saved: Iterable[tuple[str, torch.Tensor]], memory: Tensors, folder: Path) -> None:
    """Check that each tensor that was read equals the one in memory, in the dtype of the latter."""
    for name, tensor in saved:
        here = memory.get(name)
        if here is None or not torch.equal(tensor.to(here), here):
            raise CheckpointError(
                f"{folder}: {name} was read, but the model in memory holds another value: loading failed"
            )
