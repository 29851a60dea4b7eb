"""Settings of concept compression."""

from dataclasses import dataclass, field


SEGMENTERS = ("null", "threshold", "fixed", "entropy", "autoregressive")
GATES = ("literal", "factorised")


@dataclass
class OnlineConceptConfig:
    """How a model compresses. Saved in `latent_reasoning.json`, and in a full model's `config.json`.

    Attributes:
        n_shallow: the number of layers that run on every token.
        n_middle: the number of layers that run on concepts only.
        n_deep: the number of layers that run on concepts and the tail.
        num_concepts: the number of codewords V. The head has one more output, `<NULL>`, for tokens that become no
            concept.
        num_codebooks: the number of codewords of a concept, one from each codebook. Their embeddings are added. The
            first codebook competes with `<NULL>`.
        segmenter: what ends a concept. `"null"`: a token whose concept is not `<NULL>`. `"threshold"`: a token at which
            the sum of probabilities passes a whole number (accumulate and fire). `"fixed"`: of every `stride` tokens
            the last `concepts_per_stride`. `"entropy"`: a token at which the entropy of the next token, read by the LM
            head from the shallow layers, is above the `<NULL>` bias (nats). `"autoregressive"`: as `"null"`, with a
            learned logit for each possible length of the concept.
        gate: `"literal"`: the largest of V + 1 logits, sampled in training, with gradients through concepts only.
            `"factorised"`: a concept if p = sigmoid(LSE(concepts) - l_NULL) > 1/2, in training as in decoding, with
            gradients on both sides. Only the codeword is sampled.
        stride, concepts_per_stride: of the fixed segmenter.
        max_tail: the largest number of tokens since the last concept, after which a concept is forced. None means no
            limit.
        max_nulls: the number of tokens of a text that may become no concept. Further tokens all become concepts. None
            means no limit.
        boundary_keeps_token: a token that became a concept also stays in the tail until the next one does.

    Raises:
        ValueError: a value is unknown or out of range, or settings contradict each other.
    """

    n_shallow: int = field(default=4)
    n_middle: int = field(default=20)
    n_deep: int = field(default=4)
    num_concepts: int = field(default=4096)
    num_codebooks: int = field(default=1)
    segmenter: str = field(default="null")
    gate: str = field(default="literal")
    stride: int = field(default=4)
    concepts_per_stride: int = field(default=1)
    max_tail: int | None = field(default=None)
    max_nulls: int | None = field(default=None)
    boundary_keeps_token: bool = field(default=False)

    def __post_init__(self) -> None:
        least = dict.fromkeys(
            ("n_shallow", "n_middle", "n_deep", "num_concepts", "num_codebooks", "stride", "concepts_per_stride"), 1
        )
        for name, lowest in (least | {"max_tail": 1, "max_nulls": 0}).items():
            value = getattr(self, name)
            if value is None and name in ("max_tail", "max_nulls"):
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < lowest:
                raise ValueError(f"{name}={value!r}: must be a whole number, at least {lowest}")
        for name, allowed in (("segmenter", SEGMENTERS), ("gate", GATES)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose one of {', '.join(allowed)}")
        if self.concepts_per_stride > self.stride:
            raise ValueError(f"concepts_per_stride={self.concepts_per_stride}: must be at most stride={self.stride}")
        if self.segmenter == "autoregressive" and self.max_tail is None:
            raise ValueError("segmenter='autoregressive' learns a logit for every length up to max_tail: set max_tail")
        if self.segmenter == "fixed" and (self.max_tail is not None or self.max_nulls is not None):
            raise ValueError("segmenter='fixed' sets lengths by its stride; set max_tail=None and max_nulls=None")

    @property
    def null(self) -> int:
        """The id of `<NULL>`."""
        return self.num_concepts

    @property
    def parts(self) -> tuple[range, range, range]:
        """The indices of the shallow, middle and deep layers."""
        middle, deep = self.n_shallow, self.n_shallow + self.n_middle
        return range(middle), range(middle, deep), range(deep, deep + self.n_deep)
