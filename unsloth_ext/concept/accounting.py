"""What compression saves, counted: multiplications and bytes of keys and values, of a text's mean token."""

from dataclasses import dataclass
from typing import Any

from .config import OnlineConceptConfig


@dataclass(frozen=True)
class Cost:
    """Of one token of a text.

    Attributes:
        layers: multiply-accumulates in the layers' weights. attention: of scores and values, over the text so far.
        lm_head, concept_head: of the two heads.
        kv: keys and values held for it, elements.
    """

    layers: float
    attention: float
    lm_head: float
    concept_head: float
    kv: float

    @property
    def macs(self) -> float:
        """All multiply-accumulates."""
        return self.layers + self.attention + self.lm_head + self.concept_head


def cost(
    model: Any,
    concepts: OnlineConceptConfig | None = None,
    ratio: float = 4.0,
    tokens: int = 0,
    tail: float | None = None,
) -> Cost:
    """Cost of a text of so many `tokens`, its mean token; 0 leaves attention out.

    Args:
        model: a transformers config of a llama, qwen2 or qwen3.
        concepts: None: the model as it is.
        ratio: tokens for each concept.
        tail: tokens since the last concept, the mean over a text; None: those of evenly spread concepts. A gate that is not
            held to it may have few concepts or many and long tails all the same.
    """
    d, head = model.hidden_size, getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    queries, values = model.num_attention_heads * head, model.num_key_value_heads * head
    layer = 2 * d * queries + 2 * d * values + 3 * d * model.intermediate_size
    lm_head = d * model.vocab_size
    score = lambda sees: 2 * queries * sees  # noqa: E731 - queries with keys, then weights with values
    if concepts is None:
        layers = model.num_hidden_layers
        return Cost(layers * layer, layers * score(tokens / 2), lm_head, 0, layers * 2 * values)
    shallow, middle, deep = (len(part) for part in concepts.parts)
    made = 1 / ratio
    tail = (ratio - 1) / 2 if tail is None else tail
    doubled = made if concepts.boundary_keeps_token else 0.0  # slots that hold the token beside its concept
    runs = shallow + middle * made + deep * (1 + doubled)
    seen = (
        shallow * score(tokens / 2)
        + middle * made * score(made * tokens / 2)
        + deep * (1 + doubled) * score((made * tokens / 2 + tail) * bool(tokens))
    )
    held = shallow + middle * made + deep * (made + (tail / tokens if tokens else 0))
    head_macs = d * (concepts.num_codebooks * concepts.num_concepts + 1)
    if concepts.segmenter == "entropy":
        head_macs += lm_head
    return Cost(runs * layer, seen, lm_head, head_macs, held * 2 * values)


def equal_depth(model: Any, concepts: OnlineConceptConfig, ratio: float) -> int:
    """Layers of the same width that cost what the model with concepts does, heads among it."""
    whole, ours = cost(model), cost(model, concepts, ratio)
    return round((ours.layers + ours.concept_head) / (whole.layers / model.num_hidden_layers))
