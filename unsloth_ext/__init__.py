"""Model side: thinking modules, latent tokens, KV compression and alignment, loaders and decoding. Names import lazily."""

import importlib


_WHERE = {
    "AttentionShape": "alignment.shapes",
    "CompressedCache": "kv.cache",
    "CompressedKV": "kv.compression",
    "ConceptCache": "concept.cache",
    "ConceptEmbedding": "concept.modules",
    "ConceptHead": "concept.modules",
    "ConceptModel": "concept.model",
    "ConceptTypeConfig": "planner.config",
    "DelimiterMatcher": "delimiter",
    "FastThinkingModel": "fast_model",
    "HeadwiseMapProjector": "alignment.heads",
    "HybridSession": "decoding",
    "KVDimensionProjector": "alignment.heads",
    "KVScoring": "kv.compression",
    "LatentConfig": "latent.config",
    "LatentModel": "latent.model",
    "LatentReasoningModule": "latent.reasoning_module",
    "MapProjectionAligner": "alignment.aligner",
    "OnlineConceptConfig": "concept.config",
    "PlannerConfig": "planner.config",
    "PlannerExecutorModel": "planner.model",
    "RKVCompressor": "kv.compressor",
    "SegmentTimeWarper": "alignment.time_warping",
    "SharedBackboneUnifiedHead": "planner.head",
    "SoftPlan": "planner.planning",
    "StructuralKVLoss": "alignment.loss",
    "ThinkingConfig": "residual",
    "ThinkingTrace": "decoding",
    "attach_concepts": "concept.modules",
    "attach_latent": "latent.config",
    "attach_planner": "planner.head",
    "attach_thinking": "residual",
    "attention_tap": "kv.tap",
    "backbone_of": "residual",
    "captured_kvq": "alignment.capture",
    "compress_kv": "kv.compression",
    "compressed_trace": "kv.tap",
    "create_flat_aligner": "alignment.aligner",
    "create_reasoning_focused_warper": "alignment.time_warping",
    "create_structural_loss": "alignment.loss",
    "create_structured_aligner": "alignment.aligner",
    "drop_thinking": "residual",
    "execute_plan": "planner.model",
    "executor_forward": "planner.executor",
    "executor_prefix": "planner.executor",
    "has_concepts": "concept.modules",
    "has_thinking": "residual",
    "hybrid_decode": "decoding",
    "hybrid_generate": "decoding",
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
    "project": "states",
    "soft_embedding": "states",
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
