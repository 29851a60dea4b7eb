"""Configurations of logits distillation and reasoning distillation."""

import math
from dataclasses import dataclass, field

from trl import SFTConfig

from ..common.config_checks import check_positive, check_values
from ..common.teacher import TeacherConfig


TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass
class LogitsDistillConfig(TeacherConfig):
    """Configuration of logits distillation (the formula of Hinton et al., arXiv 1503.02531).

    loss = alpha CE + (1 - alpha) T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over trained tokens

    `alpha=1` is SFT and needs no teacher. The defaults are MiniMind's.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    flags_title = "Distillation of logits"
    default_sources = {"MiniMind": ("alpha", "temperature")}

    alpha: float = field(
        default=0.5, metadata={"help": "Weight of cross-entropy, 0 to 1; the KL to the teacher has the rest."}
    )
    temperature: float = field(default=1.5, metadata={"help": "Temperature T of both compared distributions."})
    allow_pickle_checkpoint: bool = field(
        default=False, metadata={"help": "Resume from a checkpoint that holds pickled optimizer state."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha}: from 0 (teacher only) to 1 (SFT)")
        check_positive(temperature=self.temperature)
        if self.alpha < 1:
            _needs_stock_loss(self)


@dataclass
class ReasoningDistillConfig(SFTConfig):
    """Configuration of reasoning distillation.

    loss = sum_t w_t NLL_t / (trained tokens), w_t = tag_weight where the target is a tag, else 1

    `tag_weight=1` is SFT. The defaults are MiniMind's.

    Raises:
        ValueError: a field has a value that is not allowed.
    """

    flags_title = "Distillation of reasoning"
    default_sources = {"MiniMind": ("tag_weight", "tags")}

    tag_weight: float = field(
        default=10.0, metadata={"help": "Weight of the cross-entropy of tags; other tokens have 1."}
    )
    tags: list[str] = field(
        default_factory=lambda: list(TAGS),
        metadata={"help": "Tags. Each becomes one token; new ones are added to the vocabulary and the embeddings."},
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
            raise ValueError(f"tags={self.tags!r}: must be a list of different, non-empty texts, such as {list(TAGS)}")
        _needs_stock_loss(self)


def _needs_stock_loss(args: SFTConfig) -> None:
    """Raise a ValueError for fields that replace the cross-entropy that is weighted here."""
    if args.loss_type != "nll":
        raise ValueError(f"loss_type={args.loss_type!r}: the distillation loss replaces it; set it to 'nll'")
    if args.label_smoothing_factor:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor}: the distillation loss replaces it; set it to 0"
        )
