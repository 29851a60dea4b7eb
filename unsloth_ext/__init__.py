"""Model side: thinking modules, latent tokens, KV compression, loaders and decoding. Names import lazily."""

import importlib


_WHERE = {
    "CompressedCache": "kv.cache",
    "CompressedKV": "kv.compression",
    "DelimiterMatcher": "delimiter",
    "FastThinkingModel": "fast_model",
    "HybridSession": "decoding",
    "KVScoring": "kv.compression",
    "LatentConfig": "latent.config",
    "LatentModel": "latent.model",
    "ThinkingConfig": "residual",
    "ThinkingTrace": "decoding",
    "attach_latent": "latent.config",
    "attach_thinking": "residual",
    "attention_tap": "kv.tap",
    "backbone_of": "residual",
    "compress_kv": "kv.compression",
    "compressed_trace": "kv.tap",
    "drop_thinking": "residual",
    "has_thinking": "residual",
    "hybrid_decode": "decoding",
    "hybrid_generate": "decoding",
    "latent_generate": "latent.model",
    "latent_phase": "latent.phase",
    "kv_similarity": "latent.probe",
    "probe_latents": "latent.probe",
    "project": "states",
    "soft_embedding": "states",
    "with_latent_modules": "latent.config",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value  # also over a submodule of the same name
    return value


def __dir__() -> list[str]:
    return __all__
