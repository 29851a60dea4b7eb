"""MiniMind's sizes as configurations of stock transformers classes.

The second generation is Llama's architecture; its mixture of experts is Granite's with shared experts and multipliers
of 1. The third generation is Qwen3's (queries and keys are normalised); its mixture of experts is Qwen3-MoE's.
Published weights load into these classes exactly.
"""

from collections.abc import Callable
from typing import Any

from transformers import GraniteMoeSharedConfig, LlamaConfig, PreTrainedConfig, Qwen3Config, Qwen3MoeConfig

from patches import granite_router_logits


VOCABULARY = 6400
TRAINED_ON, STRETCHED_TO = 2048, 32768  # positions in training, and after YaRN by 16
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
    config.initializer_range = 0.07  # 1 / sqrt(192); with the usual 0.02 this narrow model learns three times slower
    return config


def _micro() -> Qwen3Config:
    config = _third(128, 3, 320)
    config.vocab_size = 512
    config.initializer_range = 0.09  # 1 / sqrt(128)
    return config


def _third_moe() -> Qwen3MoeConfig:
    # If normalised, the weight of the one expert would always be 1, and the router would get no gradient of the LM loss
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
    """Return the coefficient with which transformers' load-balancing loss corresponds to MiniMind's.

    MiniMind adds alpha E sum_i f_i P_i for every layer, with shares f of the choices that sum to 1 (in the second
    generation for every text separately). transformers computes its loss over the tokens of all layers and texts
    together, without padding, with shares that sum to the experts of a token. With this coefficient both are alpha
    times the number of layers when experts are balanced, and they are equal for one layer and one text.
    """
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
    "micro": _micro,
}


def minimind_config(name: str, yarn: bool = False) -> PreTrainedConfig:
    """Make the stock configuration of a preset.

    Args:
        name: one of `PRESETS`.
        yarn: stretch 2,048 positions to 32,768 (YaRN, factor 16), to read longer texts than in training.

    Returns:
        The configuration.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"no MiniMind preset {name!r}; there are {', '.join(PRESETS)}")
    config = PRESETS[name]()
    if yarn:
        config.rope_parameters = {**config.rope_parameters, **YARN}
    return config
