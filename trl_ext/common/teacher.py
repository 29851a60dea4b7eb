"""A teacher model: its configuration, loading and freezing, and the check that it shares the student's vocabulary."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.integrations.fsdp import is_fsdp_enabled
from trl import SFTConfig
from trl.models.utils import prepare_deepspeed, prepare_fsdp

from unsloth_ext.common.hub import load_causal_lm, load_tokenizer

from .config_checks import check_values


@dataclass
class TeacherConfig(SFTConfig):
    """SFT's configuration with a teacher model."""

    flags_title = "Teacher"
    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the teacher; leave out if teacher_model is passed."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Arguments of the teacher's from_pretrained, as JSON: dtype (default: its own), device_map, "
            "quantization_config."
        },
    )

    def __post_init__(self) -> None:
        check_values(self)
        super().__post_init__()


def load_teacher(
    teacher: PreTrainedModel | str, given: Any, trust_remote_code: bool, device: torch.device
) -> PreTrainedModel:
    """Load a teacher, frozen and in evaluation mode, in its own dtype.

    Args:
        teacher: a model, or its hub id or folder.
        given: `teacher_model_init_kwargs`, for `from_pretrained`.
        trust_remote_code: for `from_pretrained`.
        device: where to put it, unless it has a device map or is quantised.

    Raises:
        ValueError: `given` is set for a model that is already loaded.
    """
    given = dict(given or {})
    if isinstance(teacher, str):
        given.setdefault("dtype", "auto")
        teacher = load_causal_lm(teacher, trust_remote_code=trust_remote_code, **given)
    elif given:
        raise ValueError("teacher_model_init_kwargs: teacher_model is already loaded, so they cannot be applied")
    if getattr(teacher, "hf_device_map", None) is None and not getattr(teacher, "is_quantized", False):
        teacher.to(device)
        if is_fsdp_enabled():  # with cpu_ram_efficient_loading, only the first process has loaded the weights
            for tensor in (*teacher.parameters(), *teacher.buffers()):
                torch.distributed.broadcast(tensor.data, 0)
    return teacher.eval().requires_grad_(False)


def shard_teacher(teacher: PreTrainedModel, accelerator: Accelerator) -> PreTrainedModel:
    """Shard a teacher over processes as TRL shards a reference model, with FSDP2 and DeepSpeed ZeRO-3.

    With other engines, and if it is quantised or has a device map, each process has all of it.

    Args:
        teacher: a loaded teacher.
        accelerator: the trainer's.

    Returns:
        The same model.
    """
    if getattr(teacher, "hf_device_map", None) is not None or getattr(teacher, "is_quantized", False):
        return teacher
    if accelerator.is_fsdp2:
        return prepare_fsdp(teacher, accelerator)
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return prepare_deepspeed(teacher, accelerator).module
    return teacher


def for_teacher(teacher: PreTrainedModel, inputs: dict[str, Any], here: torch.device) -> dict[str, Any]:
    """Move a batch to the device of the teacher's first weights.

    Args:
        teacher: the teacher model.
        inputs: tensors of any shape and dtype; other values stay as they are.
        here: the student's device. It is used if the teacher's weights are offloaded (meta device): accelerate's hooks
            then move the inputs.
    """
    device = next(teacher.parameters()).device
    device = here if device.type == "meta" else device
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def check_vocabularies(
    student: PreTrainedTokenizerBase, teacher: PreTrainedModel, given: PreTrainedTokenizerBase | None
) -> None:
    """Raise a ValueError that names a token with different ids in the student's and the teacher's tokenizer.

    Args:
        student: the student's tokenizer.
        teacher: the teacher model.
        given: the teacher's tokenizer; None: the one saved with the teacher.
    """
    name = teacher.config._name_or_path
    rows = teacher.get_input_embeddings().weight.shape[0]
    if rows < len(student):
        raise ValueError(f"the teacher has {rows} embeddings, but the student's tokenizer has {len(student)} tokens")
    if given is None and name and (Path(name, "tokenizer_config.json").exists() or not Path(name).exists()):
        given = load_tokenizer(name)
    if given is None:  # a model made in memory
        return
    theirs = given.get_vocab()
    for token, index in student.get_vocab().items():
        if theirs.get(token) != index:
            raise ValueError(
                f"teacher and student have different vocabularies: {token!r} is {index} in the student's tokenizer and "
                f"{theirs.get(token, 'unknown')} in the teacher's ({name or type(given).__name__}). The two are compared "
                "token by token; use a teacher with the student's vocabulary"
            )
