"""A teacher, another causal LM: loaded, frozen, and checked to read the student's tokens."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig

from unsloth_ext.common.hub import load_causal_lm, load_tokenizer

from .config_checks import check_values


@dataclass
class TeacherConfig(SFTConfig):
    """SFT's configuration with a teacher."""

    flags_title = "Teacher"
    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "teacher_model_init_kwargs"]

    teacher_model_name_or_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the teacher, unless teacher_model is given."}
    )
    teacher_model_init_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "For the teacher's from_pretrained, as JSON: dtype (its own by default), device_map, "
            "quantization_config."
        },
    )

    def __post_init__(self) -> None:
        check_values(self)
        super().__post_init__()


def load_teacher(
    teacher: PreTrainedModel | str, given: Any, trust_remote_code: bool, device: torch.device
) -> PreTrainedModel:
    """The teacher, frozen and in evaluation mode, in its own dtype; on `device` unless it has a device map or is quantised.

    Args:
        teacher: a model, its hub id or folder.
        given: `teacher_model_init_kwargs`, for `from_pretrained`.

    Raises:
        ValueError: `given` beside a model that is loaded already.
    """
    given = dict(given or {})
    if isinstance(teacher, str):
        given.setdefault("dtype", "auto")
        teacher = load_causal_lm(teacher, trust_remote_code=trust_remote_code, **given)
    elif given:
        raise ValueError("teacher_model_init_kwargs: the teacher_model that was given is loaded already")
    if getattr(teacher, "hf_device_map", None) is None and not getattr(teacher, "is_quantized", False):
        teacher.to(device)
    return teacher.eval().requires_grad_(False)


def for_teacher(teacher: PreTrainedModel, inputs: dict[str, Any], here: torch.device) -> dict[str, Any]:
    """A batch on the device of the teacher's first weights.

    Args:
        inputs: tensors, and values that stay as they are.
        here: the student's device. It serves where the teacher's weights are not in memory (meta device): accelerate's
            hooks move the inputs on from there.
    """
    device = next(teacher.parameters()).device
    device = here if device.type == "meta" else device
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def check_vocabularies(
    student: PreTrainedTokenizerBase, teacher: PreTrainedModel, given: PreTrainedTokenizerBase | None
) -> None:
    """Raises a ValueError that names a token to which the teacher's tokenizer gives another id than the student's."""
    name = teacher.config._name_or_path
    rows = teacher.get_input_embeddings().weight.shape[0]
    if rows < len(student):
        raise ValueError(f"the teacher has {rows} embeddings and the student's tokenizer {len(student)} tokens")
    if given is None and name and (Path(name, "tokenizer_config.json").exists() or not Path(name).exists()):
        given = load_tokenizer(name)
    if given is None:  # a model made in memory
        return
    theirs = given.get_vocab()
    for token, index in student.get_vocab().items():
        if theirs.get(token) != index:
            raise ValueError(
                f"teacher and student read different tokens: {token!r} is {index} to the student's tokenizer and "
                f"{theirs.get(token, 'unknown')} to the teacher's ({name or type(given).__name__}). The two are compared "
                "token by token; take a teacher with the student's vocabulary"
            )
