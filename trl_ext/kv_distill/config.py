"""Configuration of KV distillation."""

import json
from dataclasses import dataclass, field
from typing import Any

from unsloth_ext.kv_distill.aligner import DIRECTIONS, MODES, ROPE_SPACES
from unsloth_ext.kv_distill.heads import INITS
from unsloth_ext.kv_distill.loss import StructuralKVLoss
from unsloth_ext.kv_distill.time_warping import SegmentTimeWarper

from ..common.config_checks import at_least, check_weights, must_be_off, must_prepare, one_of
from ..common.teacher import TeacherConfig


@dataclass
class KVDistillConfig(TeacherConfig):
    """Configuration of KV distillation. Ours.

    loss = loss_ce + lambda_kv (alpha_k L_K + alpha_v L_V + alpha_attn L_attn + alpha_norm L_norm)

    `lambda_kv=0` is SFT and needs no teacher.

    Raises:
        ValueError: a field has a value that is not allowed, or two fields contradict each other.
    """

    flags_title = "KV distillation"
    default_sources = {
        "design note": (
            "alpha_k",
            "alpha_v",
            "alpha_attn",
            "temperature",
            "kv_projection_mode",
            "share_dim_proj",
            "init_uniform",
            "kv_init",
        )
    }
    _VALID_DICT_FIELDS = [*TeacherConfig._VALID_DICT_FIELDS, "ratio_map", "alpha_map"]

    lambda_kv: float = field(default=1.0, metadata={"help": "Weight of the structural loss; cross-entropy has 1."})
    alpha_k: float = field(default=1.0, metadata={"help": "Weight of the loss on directions of keys."})
    alpha_v: float = field(default=1.0, metadata={"help": "Weight of the loss on directions of values."})
    alpha_attn: float = field(
        default=0.5, metadata={"help": "Weight of KL(teacher || student) between attention rows."}
    )
    alpha_norm: float = field(default=0.0, metadata={"help": "Weight of the loss on norms of keys and values."})
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the compared attention rows."})
    kv_projection_mode: str = field(
        default="structured",
        metadata={"help": "'structured' maps heads, 'flat' is one map over all concatenated heads."},
    )
    kv_direction: str = field(
        default="student_to_teacher",
        metadata={"help": "Which side is projected; 'teacher_to_student' collapses unless freeze_aligner."},
    )
    kv_layer_map: str = field(
        default="uniform",
        metadata={"help": "Teacher layers to follow: 'uniform', 'last', or a JSON list such as '[1, 3]'."},
    )
    share_dim_proj: bool = field(
        default=True, metadata={"help": "Share the projection of the head dimension among all heads."}
    )
    init_uniform: bool = field(
        default=True, metadata={"help": "Start with an even map of heads; otherwise a random one."}
    )
    kv_init: str | None = field(
        default=None,
        metadata={"help": "Initialisation, replaces init_uniform: 'uniform_rms', 'identity', 'procrustes', ..."},
    )
    rope_space: str = field(
        default="rerotate",
        metadata={"help": "How rotary embeddings are treated when key heads are mixed: 'rerotate', 'pre' or 'post'."},
    )
    freeze_aligner: bool = field(default=False, metadata={"help": "Do not train the projection."})
    aligner_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the projection; None: learning_rate."}
    )
    T_s: int | None = field(
        default=None, metadata={"help": "Number of points per row at which to compare; None: every token."}
    )
    ratio_map: dict[str, Any] | str | None = field(
        default=None, metadata={"help": 'Sampling rate per segment, as JSON:  \'{"P": 1, "R": 0.5, "A": 1}\'.'}
    )
    alpha_map: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Smoothing per segment, from 0 to 1, as JSON."}
    )
    answer_delimiter: str = field(
        default="####", metadata={"help": "Text that ends the reasoning in a completion; the answer follows."}
    )
    allow_pickle_checkpoint: bool = field(
        default=False, metadata={"help": "Resume from a checkpoint that holds pickled optimizer state."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_weights(lambda_kv=self.lambda_kv)
        inits = (None, *INITS)
        one_of(self, kv_projection_mode=MODES, kv_direction=DIRECTIONS, rope_space=ROPE_SPACES, kv_init=inits)
        if self.kv_projection_mode == "flat" and self.kv_init not in (None, "procrustes"):
            raise ValueError(
                f"kv_init={self.kv_init!r}: a flat projection has no heads to map; use None or 'procrustes'"
            )
        self.layer_map()
        self.structural_loss()
        self.time_warper()
        if self.T_s is not None and self.T_s < 3:
            raise ValueError(f"T_s={self.T_s}: must be at least 3, one point for each segment")
        if not self.answer_delimiter:
            raise ValueError("answer_delimiter is empty: nothing would end the reasoning")
        at_least(self, aligner_learning_rate=0)
        if not self.lambda_kv:
            return
        must_be_off(
            self,
            packing="segments belong to single rows",
            eval_packing="segments belong to single rows",
            padding_free="segments belong to single rows",
            use_liger_kernel="it replaces the attention from which keys and values are captured",
        )
        must_prepare(self, "leaves rows without segments; tokenized rows with segment_ids are used unchanged")
        if self.completion_only_loss is False:
            raise ValueError("completion_only_loss=False: labels tell the prompt from the completion; leave it unset")
        if self.gradient_checkpointing and (self.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
            raise ValueError("use_reentrant=True: captured keys and values would have no gradients; set it to False")

    def layer_map(self) -> str | list[int]:
        """`kv_layer_map`, parsed: "uniform", "last", or a list of layers.

        Raises:
            ValueError: it is not a JSON list.
        """
        if not self.kv_layer_map.startswith("["):
            return self.kv_layer_map
        try:
            return json.loads(self.kv_layer_map)
        except ValueError as error:
            raise ValueError(f"kv_layer_map={self.kv_layer_map!r} is not a JSON list: {error}") from error

    def structural_loss(self) -> StructuralKVLoss:
        """The structural loss with these weights."""
        return StructuralKVLoss(self.alpha_k, self.alpha_v, self.alpha_attn, self.temperature, self.alpha_norm)

    def time_warper(self) -> SegmentTimeWarper | None:
        """The time warper with these maps; None if neither is given.

        Raises:
            ValueError: a map is not a JSON object.
        """
        given = {name: getattr(self, name) for name in ("ratio_map", "alpha_map") if getattr(self, name) is not None}
        for name, value in given.items():
            if not isinstance(value, dict):
                raise ValueError(f'{name}={value!r}: must be an object such as \'{{"P": 1, "R": 0.5, "A": 1}}\'')
        return SegmentTimeWarper(**given) if given else None
