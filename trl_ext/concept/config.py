"""What online concept compression adds to SFT's configuration."""

import math
from dataclasses import dataclass, field
from typing import Any

from trl import SFTConfig

from unsloth_ext.concept.config import GATES, SEGMENTERS, OnlineConceptConfig

from ..cli.presets import Presets
from ..common.config_checks import at_least, check_positive, check_values, check_weights, must_be_off


CODEBOOK_INITS = ("random", "kmeans")
# The additions that go together (docs/concept.md#settings has the evidence for each)
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
    """loss = cross-entropy + ratio_weight L_ratio + usage_weight L_usage

    The defaults are the literal objective, cross-entropy alone; `ConceptConfig.preset("stable", ...)` has the additions.
    `use_concepts=False` is SFT.
    """

    flags_title = "Concept tokens"
    presets = PRESETS

    use_concepts: bool = field(default=True, metadata={"help": "False: plain SFT, of the same rows."})
    n_shallow: int = field(default=4, metadata={"help": "Layers that run on every token."})
    n_middle: int | None = field(default=None, metadata={"help": "Layers that run on concepts; None: all others."})
    n_deep: int = field(default=4, metadata={"help": "Layers that run on concepts and the tail."})
    num_concepts: int = field(default=4096, metadata={"help": "Codewords of each codebook."})
    num_codebooks: int = field(default=1, metadata={"help": "Codewords of a concept."})
    segmenter: str = field(default="null", metadata={"help": f"What ends a concept: {', '.join(SEGMENTERS)}."})
    gate: str = field(default="literal", metadata={"help": f"{' or '.join(GATES)}: gradients one-sided or two-sided."})
    stride: int = field(default=4, metadata={"help": "Fixed segmenter: tokens of a stride."})
    concepts_per_stride: int = field(default=1, metadata={"help": "Fixed segmenter: concepts that a stride gives."})
    max_tail: int | None = field(default=None, metadata={"help": "Most tokens since the last concept."})
    max_nulls: int | None = field(default=None, metadata={"help": "Most tokens of a text that are no concepts."})
    boundary_keeps_token: bool = field(
        default=False, metadata={"help": "A token that ends a concept stays in the tail as well."}
    )
    target_ratio: float = field(
        default=4.0,
        metadata={"help": "R: tokens for each concept, which ratio_weight, calibrate_null and the warm start aim at."},
    )
    ratio_weight: float = field(default=0.0, metadata={"help": "Weight of the ratio loss (H-Net's)."})
    usage_weight: float = field(default=0.0, metadata={"help": "Weight of KL(use of the codewords || uniform)."})
    codebook_init: str = field(
        default="random", metadata={"help": "random, or kmeans: codewords from the states of training texts."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Temperature of the Gumbel softmax."})
    temperature_end: float | None = field(
        default=None, metadata={"help": "What the temperature falls to, by the same factor every step; None: it stays."}
    )
    warm_start_share: float = field(
        default=0.0, metadata={"help": "Share of the steps, at the beginning, with a concept every R tokens."}
    )
    calibrate_null: bool = field(
        default=False,
        metadata={
            "help": "Set the NULL bias before the first step, and again before the head decides, so that one token in R "
            "would become a concept."
        },
    )
    concept_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of concept head and embedding; None: learning_rate."}
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
            raise ValueError(f"target_ratio={self.target_ratio}: more than 1 token for each concept")
        check_positive(temperature=self.temperature, temperature_end=self.temperature_end)
        if not 0 <= self.warm_start_share <= 1:
            raise ValueError(f"warm_start_share={self.warm_start_share}: from 0 to 1")
        at_least(self, concept_learning_rate=0)
        if not self.use_concepts:
            return
        if self.segmenter == "fixed" and (self.ratio_weight or self.calibrate_null or self.warm_start_share):
            raise ValueError(
                "segmenter='fixed' emits by its stride: set ratio_weight=0, calibrate_null=False, warm_start_share=0"
            )
        if self.max_tail is not None and self.ratio_weight and self.max_tail <= self.target_ratio:
            raise ValueError(
                f"max_tail={self.max_tail}, target_ratio={self.target_ratio}: concepts forced so often leave nothing to "
                "decide; set max_tail to twice the ratio, or to None"
            )
        must_be_off(self, use_liger_kernel="it replaces the forward that compresses")

    def online(self, layers: int) -> OnlineConceptConfig:
        """The model's part of these fields, for one of so many layers.

        Raises:
            ValueError: n_shallow and n_deep leave none between them.
        """
        middle = layers - self.n_shallow - self.n_deep if self.n_middle is None else self.n_middle
        if middle < 1:
            raise ValueError(
                f"n_shallow={self.n_shallow}, n_deep={self.n_deep}: of the model's {layers} layers none is left between"
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
