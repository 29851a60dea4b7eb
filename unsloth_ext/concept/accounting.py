"""Costs of a model with concepts: multiply-accumulates and cached elements for the mean token of a text."""

from dataclasses import dataclass
from typing import Any

from .config import OnlineConceptConfig


@dataclass(frozen=True)
class Cost:
    """Costs of one token of a text.

    Attributes:
        layers: multiply-accumulates in the weights of the layers.
        attention: multiply-accumulates of scores and values, over the text so far.
        lm_head: multiply-accumulates of the LM head.
        concept_head: multiply-accumulates of the concept head.
        kv: the number of elements of keys and values that are held for the token.
    """

    layers: float
    attention: float
    lm_head: float
    concept_head: float
    kv: float

    @property
    def macs(self) -> float:
        """The sum of all multiply-accumulates."""
        return self.layers + self.attention + self.lm_head + self.concept_head


def cost(
    model: Any,
    concepts: OnlineConceptConfig | None = None,
    ratio: float = 4.0,
    tokens: int = 0,
    tail: float | None = None,
) -> Cost:
    """Compute the cost of the mean token of a text.

    Args:
        model: a transformers config of a llama, qwen2 or qwen3.
        concepts: how the model compresses. None means not at all.
        ratio: the number of tokens for each concept.
        tokens: the length of the text. 0 leaves attention out.
        tail: the mean number of tokens since the last concept. None means that of evenly spread concepts. A gate
            without constraints may have few or many concepts, and long tails in both cases.

    Returns:
        The cost.
    """
    d, head = model.hidden_size, getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    queries, values = model.num_attention_heads * head, model.num_key_value_heads * head
    layer = 2 * d * queries + 2 * d * values + 3 * d * model.intermediate_size
    lm_head = d * model.vocab_size
    score = lambda sees: 2 * queries * sees  # noqa: E731 - queries times keys, and weights times values
    if concepts is None:
        layers = model.num_hidden_layers
        return Cost(layers * layer, layers * score(tokens / 2), lm_head, 0, layers * 2 * values)
    shallow, middle, deep = (len(part) for part in concepts.parts)
    made = 1 / ratio
    tail = (ratio - 1) / 2 if tail is None else tail
    doubled = made if concepts.boundary_keeps_token else 0.0  # slots for the token beside its concept
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
    """Return the number of layers of the same width that cost as much as the model with concepts, its head included."""
    whole, ours = cost(model), cost(model, concepts, ratio)
    return round((ours.layers + ours.concept_head) / (whole.layers / model.num_hidden_layers))
