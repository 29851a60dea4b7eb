"""The kind of attention of each decoder layer, decided here for all methods.

transformers' rule is that of its caches (`get_layer_types_and_kwargs`): `layer_types` if a configuration has
them, else `sliding_window`, else `attention_chunk_size`. Some models do not follow it: GPT-Neo uses another field, and
RWKV has none, only a class that says it is recurrent. A window as long as the model's longest text hides nothing.
"""

from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedConfig

from .wrapping import backbone_of, causal_lm_of


FULL, SLIDING, CHUNKED = "full attention", "sliding-window attention", "chunked attention"
RECURRENT, HYBRID = "linear attention or a state space", "attention beside a state space"
SPARSE, NONE = "sparse attention", "no attention"
NAMES = {
    "full_attention": FULL,
    "global": FULL,
    "sliding_attention": SLIDING,
    "local": SLIDING,
    "chunked_attention": CHUNKED,
    "linear_attention": RECURRENT,
    "conv": RECURRENT,
    "hybrid": HYBRID,
    "hybrid_sliding": HYBRID,
    "moe": NONE,
    "mlp": NONE,
}
# Fields of configurations that hold the length of a window
FIELDS = {SLIDING: ("sliding_window", "window_size"), CHUNKED: ("attention_chunk_size",)}


@dataclass(frozen=True)
class LayerKind:
    """The kind of one layer.

    Attributes:
        name: one of the names above. Kinds that this file does not know are `SPARSE`.
        window: the number of tokens that a token can see, itself included. None means all before it.
        field: the field of the configuration that holds the window.
    """

    name: str
    window: int | None = None
    field: str | None = None

    def __str__(self) -> str:
        return self.name if self.window is None else f"{self.name} over {self.window:,} tokens"


def layer_kinds(model: nn.Module) -> list[LayerKind]:
    """Return the kind of each layer of a causal LM, wrapped by PEFT or not."""
    backbone = backbone_of(model)
    config = backbone.config.get_text_config(decoder=True)
    found = getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or _implied(config)
    names = [NAMES.get(name, SPARSE) for name in found]
    # The class has a recurrent state and the configuration does not say in which layers: assume all
    stateful = any(getattr(part, "_is_stateful", False) for part in (backbone, causal_lm_of(model)))
    if stateful and not {RECURRENT, HYBRID} & set(names):
        names = [RECURRENT] * len(names)
    return [_kind(name, config) for name in names]


def _implied(config: PreTrainedConfig) -> list[str]:
    kind = "full_attention"
    if getattr(config, "sliding_window", None):
        kind = "sliding_attention"
    elif getattr(config, "attention_chunk_size", None):
        kind = "chunked_attention"
    return [kind] * config.num_hidden_layers


def _kind(name: str, config: PreTrainedConfig) -> LayerKind:
    for field in FIELDS.get(name, ()):
        if getattr(config, field, None):
            return LayerKind(name, getattr(config, field), field)
    return LayerKind(FULL if name in FIELDS else name)  # no length means no window


def check_layers(model: nn.Module, what: str, longest: int | None = None, windows: tuple[str, ...] = ()) -> None:
    """Check that every layer sees the whole text.

    Args:
        model: a causal LM, wrapped by PEFT or not.
        what: the method, as the subject of "needs".
        longest: the largest number of tokens of a text. None means the model's number of positions. A window of that
            length hides nothing.
        windows: kinds of windows that the method supports, however short they are.

    Raises:
        ValueError: some layers do not. The message names them, their window and the remedy.
    """
    kinds = layer_kinds(model)
    config = backbone_of(model).config.get_text_config(decoder=True)
    used = longest or getattr(config, "max_position_embeddings", None)

    def fits(kind: LayerKind) -> bool:
        return kind.name == FULL or kind.name in windows or bool(kind.window and used and used <= kind.window)

    bad = [i for i, kind in enumerate(kinds) if not fits(kind)]
    if not bad:
        return
    kind = kinds[bad[0]]
    where = numbered([i for i in bad if kinds[i] == kind])
    sentence = f"{type(causal_lm_of(model)).__name__} has {kind} in {where}; {what} needs "
    if kind.window is None:
        raise ValueError(
            f"{sentence}keys and values of every token in every layer: take a model such as llama or qwen3"
        )
    raise ValueError(
        f"{sentence}every layer to see the whole text of up to {used:,} tokens: load the model with {kind.field}={used}, "
        f"which changes nothing for texts of up to {kind.window:,}"
    )


def check_length(model: nn.Module, tokens: int, what: str) -> None:
    """Raise a ValueError if a text is longer than a window that was assumed to cover the whole text."""
    kinds = [kind for kind in layer_kinds(model) if kind.window and tokens > kind.window]
    if kinds:
        kind = min(kinds, key=lambda kind: kind.window or 0)
        raise ValueError(
            f"{tokens:,} tokens: the model has {kind}; {what} needs every layer to see all of them: shorten the text, or "
            f"load the model with a larger {kind.field}"
        )


def numbered(layers: list[int]) -> str:
    """Return layer numbers in words."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers == list(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"
