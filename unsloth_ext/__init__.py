"""Model side: thinking modules, latent tokens, KV compression and alignment, loaders and decoding. Names import lazily."""

import importlib


_WHERE = {
    "AttentionShape": "kv_distill.shapes",
    "CompressedCache": "kv_compression.cache",
    "CompressedKV": "kv_compression.compression",
    "ConceptCache": "concept.cache",
    "ConceptEmbedding": "concept.modules",
    "ConceptHead": "concept.modules",
    "ConceptModel": "concept.model",
    "ConceptTypeConfig": "planner.config",
    "DelimiterMatcher": "common.delimiter",
    "FastThinkingModel": "hrpo.fast_model",
    "HeadwiseMapProjector": "kv_distill.heads",
    "HybridSession": "hrpo.decoding",
    "KVDimensionProjector": "kv_distill.heads",
    "KVScoring": "kv_compression.compression",
    "LatentConfig": "latent.config",
    "LatentModel": "latent.model",
    "LatentReasoningModule": "latent.reasoning_module",
    "MapProjectionAligner": "kv_distill.aligner",
    "OnlineConceptConfig": "concept.config",
    "PlannerConfig": "planner.config",
    "PlannerExecutorModel": "planner.model",
    "RKVCompressor": "kv_compression.compressor",
    "SegmentTimeWarper": "kv_distill.time_warping",
    "SharedBackboneUnifiedHead": "planner.head",
    "SoftPlan": "planner.planning",
    "StructuralKVLoss": "kv_distill.loss",
    "ThinkingConfig": "hrpo.residual",
    "ThinkingTrace": "hrpo.decoding",
    "attach_concepts": "concept.modules",
    "attach_latent": "latent.config",
    "attach_planner": "planner.head",
    "attach_thinking": "hrpo.residual",
    "attention_tap": "common.attention_tap",
    "backbone_of": "common.wrapping",
    "captured_kvq": "kv_distill.capture",
    "compress_kv": "kv_compression.compression",
    "compressed_trace": "kv_compression.trace",
    "create_flat_aligner": "kv_distill.aligner",
    "create_reasoning_focused_warper": "kv_distill.time_warping",
    "create_structural_loss": "kv_distill.loss",
    "create_structured_aligner": "kv_distill.aligner",
    "drop_thinking": "hrpo.residual",
    "execute_plan": "planner.model",
    "executor_forward": "planner.executor",
    "executor_prefix": "planner.executor",
    "has_concepts": "concept.modules",
    "has_thinking": "hrpo.residual",
    "hybrid_decode": "hrpo.decoding",
    "hybrid_generate": "hrpo.decoding",
    "kv_similarity": "latent.probe",
    "latent_generate": "latent.model",
    "latent_phase": "latent.phase",
    "load_minimind": "minimind.convert",
    "minimind_config": "minimind.presets",
    "plan": "planner.planning",
    "plan_lengths": "planner.vocabulary",
    "plan_log_prob": "planner.planning",
    "plan_log_probs": "planner.planning",
    "plan_soft": "planner.planning",
    "probe_latents": "latent.probe",
    "project": "hrpo.states",
    "soft_embedding": "hrpo.states",
    "text_log_prob": "planner.executor",
    "text_nll": "planner.executor",
    "train_tokenizer": "minimind.tokenizer",
    "with_concept_modules": "concept.modules",
    "with_latent_modules": "latent.config",
    "with_planner_modules": "planner.head",
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
