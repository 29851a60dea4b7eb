"""What planning and executing add to SFT's configuration."""

import json
import math
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from unsloth_ext.planner.config import ORDERINGS, PlannerConfig

from ..common.config_checks import (
    at_least,
    check_positive,
    check_values,
    check_weights,
    must_be_off,
    must_ignore_lengths,
    must_prepare,
    must_stay,
    one_of,
)
from .data import MODES


TRAININGS = ("soft", "hard_em")


@dataclass
class PlannerExecutorConfig(SFTConfig):
    """The executor's cross-entropy + signal_weight L_signal + entropy_weight L_entropy, and

        soft      commitment_weight L_commitment + usage_weight L_usage + eos_weight L_eos + quota_weight L_quota
        hard_em   planner_weight times the planner's cross-entropy on the best plans found

    A field of the one is ignored by the other, but for those that would be asked for in vain. `use_planner=False` is SFT.
    """

    flags_title = "Planner and executor"
    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "types"]

    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "For hard_em only: in soft training transformers drops the cache with it (not where multi_token "
            "types are written in parallel, in one pass)."
        },
    )
    use_planner: bool = field(default=True, metadata={"help": "False: plain SFT, of the same rows."})
    types: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={
            "help": 'Types of concepts as a JSON list: \'[{"name": "plan", "num_concepts": 256, '
            '"quota": 16}]\', which is the default.'
        },
    )
    ordering: str = field(
        default="sequential", metadata={"help": f"Order of types in a plan: {' or '.join(ORDERINGS)}."}
    )
    multi_token: bool = field(default=False, metadata={"help": "All concepts of a type in one pass, from queries."})
    mode: str = field(
        default="generate",
        metadata={"help": "'generate': the planner reads the prompt; 'reconstruct': the text that is to be written."},
    )
    training: str = field(default="soft", metadata={"help": "'soft', by Gumbel straight-through, or 'hard_em'."})
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the Gumbel softmax; in hard_em, of the sampled candidates."}
    )
    temperature_end: float | None = field(
        default=None, metadata={"help": "What the temperature falls to, by the same factor every step; None: it stays."}
    )
    commitment_weight: float = field(
        default=0.0, metadata={"help": "Soft only: weight of 1 - cos(expected, chosen codeword)."}
    )
    usage_weight: float = field(
        default=0.3, metadata={"help": "Soft only: weight of KL(use of the concepts || uniform)."}
    )
    usage_window: float = field(
        default=4.0,
        metadata={
            "help": "That use is averaged over so many concepts for each codeword; a step of as many stands for itself."
        },
    )
    eos_weight: float = field(
        default=0.0, metadata={"help": "Weight of -log p(end) at the last slot of plans that found no end."}
    )
    target_length: list[float] | None = field(
        default=None,
        metadata={"help": "Soft only: expected concepts of each type, or one number for all; None: as it comes."},
    )
    quota_weight: float = field(default=1.0, metadata={"help": "Weight of the loss that holds plans at their target."})
    quota_rate: float = field(
        default=0.1, metadata={"help": "How fast the multipliers of the quota loss move (dual ascent)."}
    )
    word_dropout: float = field(
        default=0.0, metadata={"help": "Share of the text's tokens the executor does not read."}
    )
    z_dropout: float = field(
        default=0.1,
        metadata={
            "help": "Share of plans replaced by the null plan, which learns by this alone: at 0 its NLL means little."
        },
    )
    signal_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of y(X), each word of the text predicted from the plan and the word's place alone; a "
            "second pass of the executor."
        },
    )
    entropy_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of minus the entropy of the planner's predictions, nats each; it keeps them open."},
    )
    num_candidates: int = field(
        default=3,
        metadata={"help": "Plans that are sampled for a row in an E-step; beams and the old plan come on top."},
    )
    num_beams: int = field(
        default=1, metadata={"help": "Plans of a beam search that come on top of the samples; 1: the greedy one."}
    )
    beam_diversity: float = field(
        default=0.0,
        metadata={
            "help": "Nats that a concept costs a beam for each beam before it that has it in the same place; 0: the "
            "likeliest plans, however alike."
        },
    )
    forced_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of rows that take the best sample of an E-step as their plan, even if the old plan or a "
            "beam is better; a random plan where all samples are the old one."
        },
    )
    e_step_every: int = field(default=4, metadata={"help": "M: steps from one E-step to the next."})
    adaptive_e_step: bool = field(
        default=False, metadata={"help": "M halves while plans are stale and doubles while they are not."}
    )
    staleness_threshold: float = field(
        default=1.0,
        metadata={
            "help": "Nats that a new plan is better than the cached one: above it M halves, below a "
            "quarter of it M doubles."
        },
    )
    max_e_step_every: int = field(default=64, metadata={"help": "M goes no higher by itself."})
    planner_weight: float = field(default=1.0, metadata={"help": "Weight of -log p(plan | text); 1 is EM's own."})
    length_curriculum: list[int] | None = field(
        default=None, metadata={"help": "Train on so many tokens of each text, one after another, such as 64 128."}
    )
    length_curriculum_nll: float = field(
        default=2.0,
        metadata={"help": "The next length comes when the last 64 tokens of this one cost fewer nats each."},
    )
    length_curriculum_share: float = field(
        default=0.5, metadata={"help": "By this share of the steps texts are whole, whatever they cost."}
    )
    planner_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the new embeddings; None: learning_rate."}
    )
    allow_pickle_checkpoint: bool = field(
        default=False, metadata={"help": "Resume from a checkpoint that holds pickled optimizer state."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.types, str):
            try:
                self.types = json.loads(self.types)
            except ValueError as error:
                raise ValueError(f"types={self.types!r} is not JSON: {error}") from error
        if isinstance(self.types, dict):
            self.types = [self.types]
        check_values(self)
        super().__post_init__()
        one_of(self, mode=MODES, training=TRAININGS)
        planner = self.planner()
        at_least(self, num_candidates=0, num_beams=0, e_step_every=1, max_e_step_every=1)
        check_weights(
            commitment_weight=self.commitment_weight,
            usage_weight=self.usage_weight,
            eos_weight=self.eos_weight,
            quota_weight=self.quota_weight,
            planner_weight=self.planner_weight,
            signal_weight=self.signal_weight,
            entropy_weight=self.entropy_weight,
            beam_diversity=self.beam_diversity,
        )
        check_positive(
            temperature=self.temperature,
            temperature_end=self.temperature_end,
            quota_rate=self.quota_rate,
            usage_window=self.usage_window,
            staleness_threshold=self.staleness_threshold,
        )
        for name in ("word_dropout", "z_dropout", "forced_share"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: a share, from 0 to less than 1")
        at_least(self, planner_learning_rate=0)
        if self.num_candidates + self.num_beams < 1:
            raise ValueError("num_candidates=0, num_beams=0: an E-step has nothing to choose from; raise one of them")
        if self.forced_share and not self.num_candidates:
            raise ValueError(f"forced_share={self.forced_share}: of samples, and num_candidates=0 draws none; raise it")
        self.targets(planner)
        self._check_curriculum()
        if not self.use_planner:
            return
        must_be_off(
            self,
            packing="plans are of one row each",
            eval_packing="plans are of one row each",
            padding_free="plans are of one row each",
            assistant_only_loss="the executor writes all of the completion, or of the text",
            use_liger_kernel="the loss is that of two passes of the backbone, not of its forward",
        )
        if self.completion_only_loss is False and self.mode == "generate":
            raise ValueError(
                "completion_only_loss=False: the prompt is told from the completion by its labels; leave it unset, or set "
                "mode='reconstruct'"
            )
        must_prepare(self, "leaves rows without a plan's part")
        if self.training == "soft" and not (planner.multi_token and len(planner.groups) == 1):
            must_be_off(
                self,
                gradient_checkpointing="transformers drops the cache in training with it, and concepts would not see the "
                "text; hard_em can do with it",
            )
        must_ignore_lengths(self)
        must_stay(self, "the executor's loss knows only", loss_type="nll", label_smoothing_factor=0.0)

    def planner(self) -> PlannerConfig:
        """The model's part of these fields.

        Raises:
            ValueError: see `PlannerConfig`.
        """
        given: dict[str, Any] = {} if self.types is None else {"types": self.types}
        return PlannerConfig(ordering=self.ordering, multi_token=self.multi_token, **given)

    def targets(self, planner: PlannerConfig) -> list[float] | None:
        """`target_length`, one for each type.

        Raises:
            ValueError: there are more or fewer, or one is beyond its quota.
        """
        if self.target_length is None:
            return None
        given = self.target_length if isinstance(self.target_length, list | tuple) else [self.target_length]
        given = list(given) * len(planner.types) if len(given) == 1 else list(given)
        if len(given) != len(planner.types):
            raise ValueError(
                f"target_length={self.target_length}: one number, or one for each of {len(planner.types)} types"
            )
        for target, kind in zip(given, planner.types):
            if not 0 < target <= kind.quota:
                raise ValueError(
                    f"target_length={self.target_length}: of type {kind.name!r} more than 0 and at most its quota, "
                    f"{kind.quota}"
                )
        return given

    def _check_curriculum(self) -> None:
        lengths = self.length_curriculum
        if lengths is not None and (not lengths or lengths[0] < 1 or sorted(set(lengths)) != list(lengths)):
            raise ValueError(f"length_curriculum={lengths}: lengths of at least 1 that grow")
        if not 0 < self.length_curriculum_share <= 1:
            raise ValueError(f"length_curriculum_share={self.length_curriculum_share}: must be more than 0, at most 1")
        if not 0 <= self.length_curriculum_nll < math.inf:
            raise ValueError(f"length_curriculum_nll={self.length_curriculum_nll}: 0 nats or more")
