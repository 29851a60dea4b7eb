"""`MapProjectionAligner`, which brings keys, values and queries of a teacher and a student to one shape (ours)."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..common.master_weights import MasterWeights
from .heads import HeadwiseMapProjector, KVDimensionProjector
from .rope import Rotary
from .shapes import AttentionShape, teacher_layers
from .time_warping import SegmentTimeWarper


MODES = ("structured", "flat")
DIRECTIONS = ("student_to_teacher", "teacher_to_student")
ROPE_SPACES = ("rerotate", "pre", "post")
NAMES = ("k", "v", "q")
FILES = ("aligner.json", "aligner.safetensors")

KVQ = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class MapProjectionAligner(MasterWeights):
    """Layer map, time warp, and a projection of heads and widths for each of K, V and Q.

    The layers and times of the teacher are selected or interpolated; only the projection learns. `direction` says which
    side is projected. If the teacher's tensors are projected, the distillation loss is smallest where all of them are
    equal, and the target collapses. So the student is projected by default.

    Args:
        teacher, student: model configurations or `AttentionShape` objects.
        mode: `"structured"`, by heads, or `"flat"`, one linear map of all heads concatenated.
        direction: what is projected: `"student_to_teacher"`, or `"teacher_to_student"`, which collapses unless frozen.
        layer_map: see `teacher_layers`.
        share_dim_proj, init_uniform: see `HeadwiseMapProjector`. A flat aligner ignores them.
        init: see `HeadwiseMapProjector`. A flat aligner takes None or `"procrustes"`.
        rope_space: how keys and queries, which have a rotary embedding, are mixed. `"rerotate"` removes it and applies
            it again at the new times, `"pre"` removes it, `"post"` keeps it.
        time_warper: how times are resampled. None uses every token once.
        frozen: the projection does not learn.

    Raises:
        ValueError: a setting is unknown, or does not fit the mode.
    """

    def __init__(
        self,
        teacher: Any,
        student: Any,
        mode: str = "structured",
        direction: str = "student_to_teacher",
        layer_map: str | Sequence[int] = "uniform",
        share_dim_proj: bool = True,
        init_uniform: bool = True,
        init: str | None = None,
        rope_space: str = "rerotate",
        time_warper: SegmentTimeWarper | None = None,
        frozen: bool = False,
    ):
        super().__init__()
        choices = {"mode": (mode, MODES), "direction": (direction, DIRECTIONS), "rope_space": (rope_space, ROPE_SPACES)}
        for name, (value, allowed) in choices.items():
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: choose one of {', '.join(allowed)}")
        if mode == "flat" and init not in (None, "procrustes"):
            raise ValueError(f"init={init!r}: a flat aligner maps no heads; choose None or 'procrustes'")
        self.teacher, self.student = AttentionShape.of(teacher), AttentionShape.of(student)
        self.direction, self.rope_space, self.time_warper = direction, rope_space, time_warper
        self.settings = {
            "mode": mode,
            "direction": direction,
            "layer_map": layer_map,
            "share_dim_proj": share_dim_proj,
            "init_uniform": init_uniform,
            "init": init,
            "rope_space": rope_space,
            "frozen": frozen,
        }
        self.layers = teacher_layers(layer_map, self.teacher.num_layers, self.student.num_layers)
        source, target = (self.student, self.teacher) if self.projects_student else (self.teacher, self.student)

        def projector(name: str) -> nn.Module:
            ours, theirs = (shape.num_heads if name == "q" else shape.num_kv_heads for shape in (source, target))
            if mode == "flat":
                return KVDimensionProjector(ours, theirs, source.head_dim, target.head_dim, init)
            return HeadwiseMapProjector(
                ours, theirs, source.head_dim, target.head_dim, share_dim_proj, init_uniform, init
            )

        self.maps = nn.ModuleDict({name: projector(name) for name in NAMES})
        self.requires_grad_(not frozen)
        if rope_space != "post":
            self.rotary = nn.ModuleDict({"teacher": Rotary(self.teacher), "student": Rotary(self.student)})

    @property
    def projects_student(self) -> bool:
        """Whether the student's tensors are projected, and not the teacher's."""
        return self.direction == "student_to_teacher"

    def forward(
        self,
        k_t: torch.Tensor,
        v_t: torch.Tensor,
        q_t: torch.Tensor | None = None,
        segment_ids: torch.Tensor | None = None,
        T_s: int | None = None,
    ) -> KVQ:
        """Convert the teacher's tensors to the student's shape.

        If the student is the projected side, the pseudo-inverse of the learned maps is used, without gradients.

        Args:
            k_t, v_t (B, L_t, H_kv, T, D_t): floating point, the teacher's keys and values as attention uses them.
            q_t (B, L_t, H_q, T, D_t): floating point, its queries, or None.
            segment_ids (B, T): long, 0, 1, 2 for prompt, reasoning, answer, negative for padding. None means no
                padding.
            T_s: the number of output times, with a time warper.

        Returns:
            Keys and values (B, L_s, H_kv, T_s, D_s) and queries (B, L_s, H_q, T_s, D_s), in the dtype of the
            projection.

        Raises:
            ValueError: the tensors do not have the teacher's shape.
        """
        given = _each(lambda n, x: self._checked(x, n, self.teacher)[:, self.layers], (k_t, v_t, q_t))
        if segment_ids is None:
            segment_ids = torch.zeros(k_t.shape[0], k_t.shape[3], dtype=torch.long, device=k_t.device)
        given = _each(lambda n, x: self._plain(n, x, "teacher", segment_ids), given)
        ids = segment_ids
        if self.time_warper is not None or T_s is not None:
            plan = (self.time_warper or SegmentTimeWarper()).plan(segment_ids, T_s)
            given, ids = _each(lambda _, x: plan.apply(x), given), plan.segment_ids
        project = (lambda n, x: self.maps[n].inverse(x)) if self.projects_student else (lambda n, x: self.maps[n](x))
        return tuple(_each(lambda n, x: self._placed(n, x, "student", ids), _each(project, given)))

    def pairs(
        self,
        student: KVQ,
        teacher: KVQ,
        student_ids: torch.Tensor,
        teacher_ids: torch.Tensor | None = None,
        T_s: int | None = None,
    ) -> tuple[KVQ, KVQ, torch.Tensor]:
        """Bring both sides to the shape of the side that is not projected, as `StructuralKVLoss` compares them.

        Args:
            student: keys and values (B, L, H_kv, T, D) and queries (B, L, H_q, T, D), floating point.
            teacher: keys and values (B, L, H_kv, T, D) and queries (B, L, H_q, T, D), floating point, of the teacher's
                layers `aligner.layers`.
            student_ids (B, T): long, the segments of the student's text.
            teacher_ids (B, T): long, the segments of the teacher's text. None means that the texts are the same.
                Otherwise the teacher's segments are resampled to the lengths of the student's.
            T_s: the number of times to resample both to.

        Returns:
            The student's (k, v, q), the teacher's (k, v, q), both floating point as above, and a validity mask (B, T_s)
            bool.
        """
        side = "teacher" if self.projects_student else "student"
        same_times = self.time_warper is None and T_s is None and teacher_ids is None
        keeps = side if same_times and self.rope_space == "rerotate" else None
        s, t, ids = self._meet(student, teacher, student_ids, teacher_ids, T_s, keeps)
        if self.projects_student:
            s = _each(lambda n, x: self.maps[n](x), s)
        else:
            t = _each(lambda n, x: self.maps[n](x), t)
        s, t = (
            xs if own == keeps else _each(lambda n, x: self._placed(n, x, side, ids), xs)
            for own, xs in (("student", s), ("teacher", t))
        )
        return tuple(s), tuple(t), ids >= 0

    def compared(self, segment_ids: torch.Tensor, T_s: int | None = None) -> torch.Tensor:
        """Return the segments at the times that `pairs` compares.

        Args:
            segment_ids (B, T): long, the segments of the tokens.
            T_s: the number of times to resample to.

        Returns:
            (B, T_s) long, negative where there is no segment.
        """
        if self.time_warper is None and T_s is None:
            return segment_ids
        return (self.time_warper or SegmentTimeWarper()).plan(segment_ids, T_s).segment_ids

    @torch.no_grad()
    def fit(
        self,
        student: KVQ,
        teacher: KVQ,
        student_ids: torch.Tensor,
        teacher_ids: torch.Tensor | None = None,
        T_s: int | None = None,
    ) -> None:
        """Compute the projections in closed form from one batch, for `init="procrustes"`.

        Args:
            student: keys and values (B, L, H_kv, T, D) and queries (B, L, H_q, T, D), floating point.
            teacher: keys and values (B, L, H_kv, T, D) and queries (B, L, H_q, T, D), floating point.
            student_ids (B, T): long, the segments of the student's text.
            teacher_ids (B, T): long, the segments of the teacher's text. None means that the texts are the same.
            T_s: the number of times to resample both to.
        """
        s, t, ids = self._meet(student, teacher, student_ids, teacher_ids, T_s)
        for name, ours, theirs in zip(NAMES, s, t):
            source, target = (ours, theirs) if self.projects_student else (theirs, ours)
            self.maps[name].fit(source, target, ids >= 0)

    @property
    def fitted(self) -> bool:
        """Whether all projectors are fitted."""
        return all(bool(projector.fitted) for projector in self.maps.values())

    def _meet(self, student, teacher, student_ids, teacher_ids, T_s, keeps=None) -> tuple[list, list, torch.Tensor]:
        """Bring both sides to the same times, and return the segments there.

        The rotary embedding is removed, except on the side that `keeps` names.
        """
        s = _each(lambda n, x: self._checked(x, n, self.student), student)
        t = _each(lambda n, x: self._checked(x, n, self.teacher), teacher)
        same_text = teacher_ids is None
        if same_text:
            teacher_ids = student_ids
        if keeps != "student":
            s = _each(lambda n, x: self._plain(n, x, "student", student_ids), s)
        if keeps != "teacher":
            t = _each(lambda n, x: self._plain(n, x, "teacher", teacher_ids), t)
        warper, ids = self.time_warper or SegmentTimeWarper(), student_ids
        if self.time_warper is not None or T_s is not None:
            common = warper.plan(student_ids, T_s)
            s, ids = _each(lambda _, x: common.apply(x), s), common.segment_ids
        if not same_text or ids is not student_ids:
            plan = warper.plan(teacher_ids, target_ids=ids)
            t = _each(lambda _, x: plan.apply(x), t)
        return s, t, ids

    def _plain(self, name: str, x: torch.Tensor, side: str, ids: torch.Tensor) -> torch.Tensor:
        if name == "v" or self.rope_space == "post":
            return x
        return self.rotary[side].undo(x, _positions(ids))

    def _placed(self, name: str, x: torch.Tensor, side: str, ids: torch.Tensor) -> torch.Tensor:
        if name == "v" or self.rope_space != "rerotate":
            return x
        return self.rotary[side](x, _positions(ids))

    def _checked(self, x: torch.Tensor, name: str, shape: AttentionShape) -> torch.Tensor:
        heads = shape.num_heads if name == "q" else shape.num_kv_heads
        side = "teacher" if shape is self.teacher else "student"
        if x.dim() != 5 or (x.shape[2], x.shape[4]) != (heads, shape.head_dim):
            raise ValueError(
                f"{name} of the {side} {tuple(x.shape)}: must have the shape (B, L, {heads}, T, {shape.head_dim})"
            )
        return x

    def to_dict(self) -> dict[str, Any]:
        """Return the constructor's arguments, as in `aligner.json`."""
        warper = self.time_warper
        return {
            "teacher": self.teacher.to_dict(),
            "student": self.student.to_dict(),
            **self.settings,
            "time_warper": warper and {"ratio_map": warper.ratio_map, "alpha_map": warper.alpha_map},
        }

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `aligner.json` and `aligner.safetensors`."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / FILES[0]).write_text(json.dumps(self.to_dict(), indent=2) + "\n")
        save_file({n: x.contiguous() for n, x in self.state_dict().items()}, folder / FILES[1])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "MapProjectionAligner":
        """Load what `save_pretrained` wrote.

        Raises:
            ValueError: a file is missing, damaged, or of another shape.
        """
        folder = Path(folder)
        for name in FILES:
            if not (folder / name).is_file():
                raise ValueError(f"{folder / name} is missing")
        try:
            config = json.loads((folder / FILES[0]).read_text())
            warper = config.pop("time_warper")
            aligner = cls(**config, time_warper=warper and SegmentTimeWarper(**warper))
            aligner.load_state_dict(load_file(folder / FILES[1]))
        except (SafetensorError, RuntimeError, TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{folder}: the aligner cannot be loaded: {error}") from error
        return aligner


def create_structured_aligner(
    teacher_cfg: Any, student_cfg: Any, mode: str = "structured", **options: Any
) -> MapProjectionAligner:
    """Make an aligner that projects by heads.

    With `mode=config.kv_projection_mode`, a field of a configuration selects this projection or the flat baseline.

    Args:
        teacher_cfg, student_cfg: model configurations or `AttentionShape` objects.
        mode: see `MapProjectionAligner`.
        **options: further arguments of `MapProjectionAligner`.

    Returns:
        The aligner.
    """
    return MapProjectionAligner(teacher_cfg, student_cfg, mode=mode, **options)


def create_flat_aligner(teacher_cfg: Any, student_cfg: Any, **options: Any) -> MapProjectionAligner:
    """Make an aligner with one linear map of all heads, the baseline.

    Args:
        teacher_cfg, student_cfg: model configurations or `AttentionShape` objects.
        **options: further arguments of `MapProjectionAligner`.

    Returns:
        The aligner.
    """
    return MapProjectionAligner(teacher_cfg, student_cfg, mode="flat", **options)


def _each(work: Callable[[str, torch.Tensor], torch.Tensor], tensors: Sequence[torch.Tensor | None]) -> list:
    """Apply `work(name, x)` to K, V and Q. None stays None."""
    return [None if x is None else work(name, x) for name, x in zip(NAMES, tensors, strict=True)]


def _positions(ids: torch.Tensor) -> torch.Tensor:
    """Return the position of each token among the real tokens of its row, as models count them under a mask."""
    return ((ids >= 0).cumsum(1) - 1).clamp(min=0)
