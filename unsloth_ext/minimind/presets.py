"""MiniMind's sizes as configurations of stock transformers classes.

The second generation is Llama's architecture, its mixture Granite's with shared experts and multipliers of 1; the third is
Qwen3's (queries and keys are normalised), its mixture Qwen3-MoE's. Published weights load into these classes exactly.
"""

from collections.abc import Callable
from typing import Any

from transformers import GraniteMoeSharedConfig, LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from patches import granite_router_logits


VOCABULARY = 6400
TRAINED_ON, STRETCHED_TO = 2048, 32768  # positions, and what YaRN by 16 stretches them to
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}  # <|endoftext|>, <|im_start|>, <|im_end|>
YARN = {
    "rope_type": "yarn",
    "factor": STRETCHED_TO / TRAINED_ON,
    "original_max_position_embeddings": TRAINED_ON,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "attention_factor": 1.0,
}


def _shape(hidden: int, layers: int, inner: int, kv_heads: int, eps: float) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": STRETCHED_TO,
        "rms_norm_eps": eps,
        "tie_word_embeddings": True,
        **SPECIAL,
    }


def _second(hidden: int, layers: int, inner: int) -> LlamaConfig:
    return LlamaConfig(**_shape(hidden, layers, inner, 2, 1e-5), rope_parameters=_rope())


def _second_moe() -> GraniteMoeSharedConfig:
    head = 640 // 8
    granite_router_logits.ensure()
    return GraniteMoeSharedConfig(
        **_shape(640, 8, 1728, 2, 1e-5),
        rope_parameters=_rope(),
        num_local_experts=4,
        num_experts_per_tok=2,
        num_experts=4,
        shared_intermediate_size=1728,
        attention_multiplier=head**-0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        router_aux_loss_coef=_auxiliary(0.01, 8, 2),
    )


def _third(hidden: int, layers: int, inner: int) -> Qwen3Config:
    return Qwen3Config(**_shape(hidden, layers, inner, 4, 1e-6), head_dim=hidden // 8, rope_parameters=_rope())


def _tiny() -> Qwen3Config:
    config = _third(192, 4, 512)
    config.initializer_range = 0.07  # 1 / sqrt(192): at the usual 0.02 so narrow a model learns three times slower
    return config


def _third_moe() -> Qwen3MoeConfig:
    # Normalised, the one expert's weight would be 1 whatever the router says, and the router without the LM loss's gradient
    return Qwen3MoeConfig(
        **_shape(768, 8, 2432, 4, 1e-6),
        head_dim=96,
        rope_parameters=_rope(),
        num_experts=4,
        num_experts_per_tok=1,
        moe_intermediate_size=2432,
        norm_topk_prob=False,
        router_aux_loss_coef=_auxiliary(5e-4, 8, 1),
    )


def _auxiliary(alpha: float, layers: int, chosen: int) -> float:
    """MiniMind adds alpha E sum_i f_i P_i of every layer, with shares f of the choices, which sum to 1 (in the second
    generation of every text by itself); transformers' load-balancing loss is of the tokens of all layers and texts
    together, without padding, with shares that sum to the experts a token has. With this coefficient both are alpha times
    the layers where all is balanced, and equal for one layer and one text."""
    return alpha * layers / chosen


def _rope() -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e6}


PRESETS: dict[str, Callable[[], PreTrainedConfig]] = {
    "minimind2-small": lambda: _second(512, 8, 1408),
    "minimind2": lambda: _second(768, 16, 2048),
    "minimind2-moe": _second_moe,
    "minimind3": lambda: _third(768, 8, 2432),
    "minimind3-moe": _third_moe,
    "tiny": _tiny,
}


def minimind_config(name: str, yarn: bool = False) -> PreTrainedConfig:
    """The stock configuration of a preset.

    Args:
        name: one of `PRESETS`.
        yarn: stretch 2,048 positions to 32,768 (YaRN, factor 16), for reading longer texts than it was trained on.

    Raises:
        ValueError: no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"no MiniMind preset {name!r}; there are {', '.join(PRESETS)}")
    config = PRESETS[name]()
    if yarn:
        config.rope_parameters = {**config.rope_parameters, **YARN}
    return config
