"""What the two distillations add to SFT's configuration."""

import math
from dataclasses import dataclass, field

from trl import SFTConfig

from ..common.config_checks import check_positive, check_values
from ..common.teacher import TeacherConfig


TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass
class LogitsDistillConfig(TeacherConfig):
    """loss = alpha CE + (1 - alpha) T^2 KL(softmax(teacher / T) || softmax(student / T)), mean per trained token

    `alpha=1` is SFT: no teacher is needed. The defaults are MiniMind's.
    """

    flags_title = "Distillation of logits"

    alpha: float = field(default=0.5, metadata={"help": "Share of cross-entropy, 0 to 1; the teacher has the rest."})
    temperature: float = field(default=1.5, metadata={"help": "T: of both distributions that are compared."})
    allow_pickle_checkpoint: bool = field(
        default=False, metadata={"help": "Resume from a checkpoint that holds pickled optimizer state."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: a share, from 0 (the teacher alone) to 1 (SFT)")
        check_positive(temperature=self.temperature)
        if self.alpha < 1:
            _needs_stock_loss(self)


@dataclass
class ReasoningDistillConfig(SFTConfig):
    """loss = sum_t w_t NLL_t / (trained tokens), w_t = tag_weight where the target is a tag, else 1

    `tag_weight=1` is SFT. The defaults are MiniMind's.
    """

    flags_title = "Distillation of reasoning"

    tag_weight: float = field(default=10.0, metadata={"help": "Weight of a tag's cross-entropy; of other tokens 1."})
    tags: list[str] = field(
        default_factory=lambda: list(TAGS),
        metadata={"help": "Each becomes one token, which is added to vocabulary and embeddings if it is not there."},
    )
    allow_pickle_checkpoint: bool = field(
        default=False, metadata={"help": "Resume from a checkpoint that holds pickled optimizer state."}
    )

    def __post_init__(self) -> None:
        check_values(self)
        super().__post_init__()
        if not 0 <= self.tag_weight < math.inf:
            raise ValueError(f"tag_weight={self.tag_weight}: 0 or more; 1 is SFT")
        if isinstance(self.tags, str) or not self.tags or not all(self.tags) or len({*self.tags}) < len(self.tags):
            raise ValueError(f"tags={self.tags!r}: a list of different texts, none of them empty, such as {list(TAGS)}")
        _needs_stock_loss(self)


def _needs_stock_loss(args: SFTConfig) -> None:
    """Raises a ValueError for fields that put another loss in place of the cross-entropy which is weighted."""
    if args.loss_type != "nll":
        raise ValueError(f"loss_type={args.loss_type!r}: the distillation's loss takes its place; set it to 'nll'")
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor}: the distillation's loss takes its place; set it to 0"
        )
