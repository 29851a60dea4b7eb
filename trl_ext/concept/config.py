"""Configuration of online concept compression."""

import math
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from unsloth_ext.concept.config import GATES, SEGMENTERS, OnlineConceptConfig

from ..cli.presets import Presets
from ..common.config_checks import at_least, check_positive, check_values, check_weights, must_be_off


CODEBOOK_INITS = ("random", "kmeans")
# Extensions that belong together (docs/concept.md#settings has the evidence for each)
PRESETS: dict[str, dict[str, Any]] = {
    "literal": {},
    "stable": {
        "codebook_init": "kmeans",
        "gate": "factorised",
        "ratio_weight": 1.0,
        "usage_weight": 0.1,
        "calibrate_null": True,
        "warm_start_share": 0.2,
    },
}


@dataclass
class ConceptConfig(Presets, SFTConfig):
    """Configuration of online concept compression. Ours; the ratio loss is H-Net's (arXiv 2507.07955).

    loss = cross-entropy + ratio_weight L_ratio + usage_weight L_usage

    The defaults are the literal objective, cross-entropy only. `ConceptConfig.preset("stable", ...)` has the
    extensions. `use_concepts=False` is SFT.

    Raises:
        ValueError: a field has a value that is not allowed, or two fields contradict each other.
    """

    flags_title = "Concept tokens"
    presets = PRESETS
    default_sources = {
        "design note": (
            "n_shallow",
            "n_deep",
            "num_concepts",
            "segmenter",
            "gate",
            "temperature",
            "target_ratio",
        )
    }

    use_concepts: bool = field(default=True, metadata={"help": "False: plain SFT on the same rows."})
    n_shallow: int = field(default=4, metadata={"help": "Number of layers that run on every token."})
    n_middle: int | None = field(
        default=None, metadata={"help": "Number of layers that run on concepts only; None: all others."}
    )
    n_deep: int = field(default=4, metadata={"help": "Number of layers that run on concepts and the tail."})
    num_concepts: int = field(default=4096, metadata={"help": "Number of codewords per codebook."})
    num_codebooks: int = field(default=1, metadata={"help": "Number of codebooks; a concept has one codeword of each."})
    segmenter: str = field(default="null", metadata={"help": f"Rule that ends a concept: {', '.join(SEGMENTERS)}."})
    gate: str = field(default="literal", metadata={"help": f"{' or '.join(GATES)}: one-sided or two-sided gradients."})
    stride: int = field(default=4, metadata={"help": "Fixed segmenter: tokens per stride."})
    concepts_per_stride: int = field(default=1, metadata={"help": "Fixed segmenter: concepts per stride."})
    max_tail: int | None = field(default=None, metadata={"help": "Maximum number of tokens since the last concept."})
    max_nulls: int | None = field(
        default=None, metadata={"help": "Maximum number of tokens of a text that are not concepts."}
    )
    boundary_keeps_token: bool = field(
        default=False, metadata={"help": "Keep a token that ends a concept in the tail too."}
    )
    target_ratio: float = field(
        default=4.0,
        metadata={"help": "R, tokens per concept: the target of ratio_weight, calibrate_null and the warm start."},
    )
    ratio_weight: float = field(default=0.0, metadata={"help": "Weight of the ratio loss (H-Net's)."})
    usage_weight: float = field(default=0.0, metadata={"help": "Weight of KL(usage of codewords || uniform)."})
    codebook_init: str = field(
        default="random", metadata={"help": "'random', or 'kmeans' on the hidden states of training texts."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the Gumbel softmax."})
    temperature_end: float | None = field(
        default=None, metadata={"help": "Final temperature, reached by the same factor at each step; None: constant."}
    )
    warm_start_share: float = field(
        default=0.0, metadata={"help": "Share of steps at the start with a concept every R tokens."}
    )
    calibrate_null: bool = field(
        default=False,
        metadata={
            "help": "Set the NULL bias before the first step, and again after the warm start, so that one token in R "
            "would become a concept."
        },
    )
    concept_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the concept head and embedding; None: learning_rate."}
    )
    allow_pickle_checkpoint: bool = field(
        default=False, metadata={"help": "Resume from a checkpoint that holds pickled optimizer state."}
    )

    def __post_init__(self) -> None:
        check_values(self)
        super().__post_init__()
        at_least(self, n_shallow=1, n_middle=1, n_deep=1)
        self.online(self.n_shallow + (self.n_middle or 1) + self.n_deep)
        if self.codebook_init not in CODEBOOK_INITS:
            raise ValueError(f"codebook_init={self.codebook_init!r}: choose one of {', '.join(CODEBOOK_INITS)}")
        check_weights(ratio_weight=self.ratio_weight, usage_weight=self.usage_weight)
        if not 1 < self.target_ratio < math.inf:
            raise ValueError(f"target_ratio={self.target_ratio}: must be more than 1 token per concept")
        check_positive(temperature=self.temperature, temperature_end=self.temperature_end)
        if not 0 <= self.warm_start_share <= 1:
            raise ValueError(f"warm_start_share={self.warm_start_share}: from 0 to 1")
        at_least(self, concept_learning_rate=0)
        if not self.use_concepts:
            return
        if self.segmenter == "fixed" and (self.ratio_weight or self.calibrate_null or self.warm_start_share):
            raise ValueError(
                "segmenter='fixed' uses a stride: set ratio_weight=0, calibrate_null=False, warm_start_share=0"
            )
        if self.max_tail is not None and self.ratio_weight and self.max_tail <= self.target_ratio:
            raise ValueError(
                f"max_tail={self.max_tail}, target_ratio={self.target_ratio}: concepts forced that often leave nothing to "
                "decide; set max_tail to twice the ratio, or to None"
            )
        must_be_off(self, use_liger_kernel="it replaces the forward pass that compresses")

    def online(self, layers: int) -> OnlineConceptConfig:
        """The settings of the model's concepts, for a model with `layers` layers.

        Raises:
            ValueError: n_shallow and n_deep leave no layer between them.
        """
        middle = layers - self.n_shallow - self.n_deep if self.n_middle is None else self.n_middle
        if middle < 1:
            raise ValueError(
                f"n_shallow={self.n_shallow}, n_deep={self.n_deep}: they leave no layer of the model's {layers} in between"
            )
        return OnlineConceptConfig(
            self.n_shallow,
            middle,
            self.n_deep,
            self.num_concepts,
            self.num_codebooks,
            self.segmenter,
            self.gate,
            self.stride,
            self.concepts_per_stride,
            self.max_tail,
            self.max_nulls,
            self.boundary_keeps_token,
        )
