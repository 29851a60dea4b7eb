"""The shape of a model's attention, and the map from a student's layers to a teacher's (ours)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedConfig


@dataclass(frozen=True)
class AttentionShape:
    """The properties of a model's attention that an alignment depends on.

    Attributes:
        num_layers: L.
        num_heads: the number of query heads.
        num_kv_heads: the number of heads of keys and values.
        head_dim: D.
        rope: the parameters of the rotary embedding and the number of positions. None for a model without it.

    Raises:
        ValueError: a number is not positive, or `num_heads` is no multiple of `num_kv_heads`.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("num_layers", "num_heads", "num_kv_heads", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number, at least 1")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}")

    @classmethod
    def of(cls, given: Any) -> "AttentionShape":
        """Return the shape of a model's configuration, of a mapping with the fields of this class, or of a shape.

        Raises:
            ValueError: a field is missing or unknown.
        """
        if isinstance(given, AttentionShape):
            return given
        if isinstance(given, Mapping):
            unknown = given.keys() - cls.__dataclass_fields__.keys()
            if unknown:
                raise ValueError(f"{', '.join(sorted(unknown))}: an attention shape has no such field")
            try:
                return cls(**given)
            except TypeError as error:
                raise ValueError(f"attention shape: {error}") from error
        if not isinstance(given, PreTrainedConfig):
            raise ValueError(f"{type(given).__name__}: give a model's configuration or an AttentionShape")
        config = given.get_text_config()
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        rope = getattr(config, "rope_parameters", None)
        if rope is not None:
            rope = {**rope, "max_position_embeddings": config.max_position_embeddings}
        kv = getattr(config, "num_key_value_heads", None) or heads
        return cls(config.num_hidden_layers, heads, kv, width, rope)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


def teacher_layers(how: str | Sequence[int], teacher: int, student: int) -> list[int]:
    """Return the teacher's layer for each layer of the student.

    Args:
        how: `"uniform"`, the first layer of each of `student` equal parts. A layer makes keys and values from its
            input, so the student's first layer, which reads embeddings, is paired with the teacher's first. `"last"`,
            the teacher's last layers. Or the layers themselves, from 0.
        teacher, student: the numbers of layers.

    Returns:
        A layer of the teacher for each of the student's.

    Raises:
        ValueError: there are no such layers.
    """
    if how == "uniform":
        return [i * teacher // student for i in range(student)]
    if how == "last":
        if teacher < student:
            raise ValueError(f"layer_map='last': the teacher has {teacher} layers, the student {student}")
        return list(range(teacher - student, teacher))
    if isinstance(how, str):
        raise ValueError(f"layer_map={how!r}: must be 'uniform', 'last' or a list of the teacher's layers")
    layers = list(how)
    if len(layers) != student or not all(isinstance(i, int) and 0 <= i < teacher for i in layers):
        raise ValueError(
            f"layer_map={layers}: must be one of the teacher's layers 0 to {teacher - 1} for each of the student's "
            f"{student}"
        )
    return layers
