"""Training side: trainers and configs that are drop-ins for TRL's, and what they measure. Names are made on first use, from
the TRL that is live.

`trl.GRPOTrainer` may be TRL's own class or the one that Unsloth generated; `HRPOTrainer` subclasses whichever it is at the
moment the name is asked for, so import Unsloth, if at all, before you use these names.
"""

import importlib


_WHERE = {
    "AutoAdaptiveValueTracker": "spo",
    "CODIConfig": "latent.methods",
    "CODILoss": "latent.loss_modules",
    "CODITrainer": "latent.methods",
    "ConceptConfig": "concept",
    "ConceptTrainer": "concept",
    "GradientNorm": "planner.monitors",
    "HRPOConfig": "hrpo",
    "HRPOTrainer": "hrpo",
    "KAVAConfig": "latent.methods",
    "KAVALoss": "latent.loss_modules",
    "KAVATrainer": "latent.methods",
    "KVDistillationLoss": "latent.loss_modules",
    "LatentReasoningModule": "latent.loss_modules",
    "RKVCompressor": "latent.loss_modules",
    "KVDistillConfig": "kv_distill",
    "KVDistillTrainer": "kv_distill",
    "LogitsDistillConfig": "distill",
    "LogitsDistillTrainer": "distill",
    "PCCoTConfig": "latent.methods",
    "PCCoTTrainer": "latent.methods",
    "PPOConfig": "ppo",
    "PPOTrainer": "ppo",
    "PlannerExecutorConfig": "planner",
    "PlannerExecutorTrainer": "planner",
    "PlannerMonitorCallback": "planner.monitor_callback",
    "PlannerQuotaController": "planner.quota",
    "ReasoningDistillConfig": "distill",
    "ReasoningDistillTrainer": "distill",
    "SPOConfig": "spo",
    "SPOTrainer": "spo",
    "RolloutDiagnostics": "common.rollout_diagnostics",
    "ThinkingProjectionMonitor": "hrpo.monitors",
    "advise": "planner.diagnostics",
    "commitment_loss": "planner.losses",
    "cosine_and_l2": "planner.monitors",
    "delta_nll": "planner.monitors",
    "entropy_and_max_prob": "planner.monitors",
    "evaluate_concepts": "concept.evaluation",
    "evaluate_plans": "planner.evaluation",
    "flip_rate": "planner.monitors",
    "loss_eos": "planner.losses",
    "load_minimind_data": "minimind",
    "nll_by_bucket": "planner.monitors",
    "ratio_loss": "concept.losses",
    "staleness_gap": "planner.monitors",
    "top1_margin": "planner.monitors",
    "usage_kl_to_uniform": "common.codeword_usage",
}
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)  # not kept: Unsloth may come later


def __dir__() -> list[str]:
    return __all__
