"""Configuration of planner and executor."""

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
    """Configuration of planner and executor. Ours.

    loss = the executor's cross-entropy + signal_weight L_signal + entropy_weight L_entropy, plus

        soft      commitment_weight L_commitment + usage_weight L_usage + eos_weight L_eos + quota_weight L_quota
        hard_em   planner_weight times the planner's cross-entropy on the best plans found

    Fields of one training are ignored by the other. `use_planner=False` is SFT.

    Raises:
        ValueError: a field has a value that is not allowed, or two fields contradict each other.
    """

    flags_title = "Planner and executor"
    default_sources = {"design note": ("types", "ordering", "mode", "training", "temperature", "num_candidates")}
    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "types"]

    gradient_checkpointing: bool = field(
        default=False,
        metadata={
            "help": "For hard_em only: with it, transformers drops the cache that soft training needs (except for "
            "multi_token types in parallel, which need one pass)."
        },
    )
    use_planner: bool = field(default=True, metadata={"help": "False: plain SFT on the same rows."})
    types: list[dict[str, Any]] | str | None = field(
        default=None,
        metadata={
            "help": 'Types of concepts, as a JSON list:  \'[{"name": "plan", "num_concepts": 256, '
            '"quota": 16}]\', which is the default.'
        },
    )
    ordering: str = field(
        default="sequential", metadata={"help": f"Order of types in a plan: {' or '.join(ORDERINGS)}."}
    )
    multi_token: bool = field(
        default=False, metadata={"help": "Predict all concepts of a type in one pass, from queries."}
    )
    mode: str = field(
        default="generate",
        metadata={"help": "'generate': the planner reads the prompt; 'reconstruct': it reads the text to write."},
    )
    training: str = field(default="soft", metadata={"help": "'soft' (straight-through Gumbel softmax) or 'hard_em'."})
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of the Gumbel softmax; in hard_em, of the sampled candidates."}
    )
    temperature_end: float | None = field(
        default=None, metadata={"help": "Final temperature, reached by the same factor at each step; None: constant."}
    )
    commitment_weight: float = field(
        default=0.0, metadata={"help": "Soft only: weight of 1 - cos(expected codeword, chosen codeword)."}
    )
    usage_weight: float = field(
        default=0.3, metadata={"help": "Soft only: weight of KL(usage of concepts || uniform)."}
    )
    usage_window: float = field(
        default=4.0,
        metadata={
            "help": "Usage is averaged over about this many concepts per codeword; a step with more is used alone."
        },
    )
    eos_weight: float = field(
        default=0.0, metadata={"help": "Soft only: weight of -log p(<EOS>) at the last slot of plans without an end."}
    )
    target_length: list[float] | None = field(
        default=None,
        metadata={"help": "Soft only: target number of concepts per type, or one for all; None: no target."},
    )
    quota_weight: float = field(
        default=1.0, metadata={"help": "Soft only: weight of the loss that keeps plans at target_length."}
    )
    quota_rate: float = field(
        default=0.1, metadata={"help": "Step size of the multipliers of the quota loss (dual ascent)."}
    )
    word_dropout: float = field(
        default=0.0, metadata={"help": "Share of the text's tokens that are hidden from the executor."}
    )
    z_dropout: float = field(
        default=0.1,
        metadata={
            "help": "Share of plans replaced by the null plan, which only this trains; at 0 its NLL means little."
        },
    )
    signal_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of y(X): each token predicted from only the plan and its position; needs a "
            "second pass of the executor."
        },
    )
    entropy_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the negative entropy (nats) of the planner's predictions."},
    )
    num_candidates: int = field(
        default=3,
        metadata={"help": "Number of plans sampled per row in an E-step, besides beams and the old plan."},
    )
    num_beams: int = field(
        default=1, metadata={"help": "Number of plans from beam search in an E-step, besides the samples; 1: greedy."}
    )
    beam_diversity: float = field(
        default=0.0,
        metadata={
            "help": "Penalty in nats for each earlier beam with the same concept in the same place; 0: the "
            "most likely plans, however similar."
        },
    )
    forced_share: float = field(
        default=0.0,
        metadata={
            "help": "Share of rows that must take the best sample of an E-step, even if the old plan or a "
            "beam is better; a random plan if all samples equal the old plan."
        },
    )
    e_step_every: int = field(default=4, metadata={"help": "M, the number of steps between two E-steps."})
    adaptive_e_step: bool = field(
        default=False, metadata={"help": "Halve M while plans are stale, and double it while they are not."}
    )
    staleness_threshold: float = field(
        default=1.0,
        metadata={
            "help": "Staleness in nats (best plan minus cached plan): above it M is halved, below a "
            "quarter of it M is doubled."
        },
    )
    max_e_step_every: int = field(default=64, metadata={"help": "Largest M that adaptive_e_step sets."})
    planner_weight: float = field(default=1.0, metadata={"help": "Weight of -log p(plan | text); 1 is plain EM."})
    length_curriculum: list[int] | None = field(
        default=None, metadata={"help": "Lengths in tokens to cut texts to, one after another, such as 64 128."}
    )
    length_curriculum_nll: float = field(
        default=2.0,
        metadata={"help": "Go to the next length when the last 64 tokens of this one have a lower NLL, in nats."},
    )
    length_curriculum_share: float = field(
        default=0.5, metadata={"help": "Share of the steps after which texts are whole, whatever their NLL."}
    )
    planner_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the planner's embeddings; None: learning_rate."}
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
                raise ValueError(f"{name}={getattr(self, name)}: must be from 0 to less than 1")
        at_least(self, planner_learning_rate=0)
        if self.num_candidates + self.num_beams < 1:
            raise ValueError("num_candidates=0, num_beams=0: an E-step would have no candidates; raise one of them")
        if self.forced_share and not self.num_candidates:
            raise ValueError(
                f"forced_share={self.forced_share}: needs samples, but num_candidates=0; raise num_candidates"
            )
        self.targets(planner)
        self._check_curriculum()
        if not self.use_planner:
            return
        must_be_off(
            self,
            packing="each row has its own plan",
            eval_packing="each row has its own plan",
            padding_free="each row has its own plan",
            assistant_only_loss="the executor writes the whole completion, or the whole text",
            use_liger_kernel="the loss needs two passes of the backbone",
        )
        if self.completion_only_loss is False and self.mode == "generate":
            raise ValueError(
                "completion_only_loss=False: labels tell the prompt from the completion; leave it unset, or set "
                "mode='reconstruct'"
            )
        must_prepare(self, "leaves rows without the planner's columns")
        if self.training == "soft" and not (planner.multi_token and len(planner.groups) == 1):
            must_be_off(
                self,
                gradient_checkpointing="transformers drops the cache in training with it, and concepts would not see the "
                "text; hard_em works with it",
            )
        must_ignore_lengths(self)
        must_stay(self, "the executor's loss supports only", loss_type="nll", label_smoothing_factor=0.0)

    def planner(self) -> PlannerConfig:
        """The settings of the model's planner.

        Raises:
            ValueError: see `PlannerConfig`.
        """
        given: dict[str, Any] = {} if self.types is None else {"types": self.types}
        return PlannerConfig(ordering=self.ordering, multi_token=self.multi_token, **given)

    def targets(self, planner: PlannerConfig) -> list[float] | None:
        """`target_length` for each type.

        Raises:
            ValueError: the number of targets differs from the number of types, or a target is above its quota.
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
                    f"target_length={self.target_length}: for type {kind.name!r}, use more than 0 and at most its quota, "
                    f"{kind.quota}"
                )
        return given

    def _check_curriculum(self) -> None:
        lengths = self.length_curriculum
        if lengths is not None and (not lengths or lengths[0] < 1 or sorted(set(lengths)) != list(lengths)):
            raise ValueError(f"length_curriculum={lengths}: must be increasing lengths of at least 1")
        if not 0 < self.length_curriculum_share <= 1:
            raise ValueError(f"length_curriculum_share={self.length_curriculum_share}: must be more than 0, at most 1")
        if not 0 <= self.length_curriculum_nll < math.inf:
            raise ValueError(f"length_curriculum_nll={self.length_curriculum_nll}: 0 nats or more")
