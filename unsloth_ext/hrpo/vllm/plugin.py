"""What vLLM calls in each of its processes when it starts (entry point `vllm.general_plugins`)."""

import logging
from typing import Any

import patches
from patches.versions import untested_allowed, version_problem

from ..states import SOFT_SOURCES
from .models import ARCHITECTURES, PREFIX


log = logging.getLogger(__name__)
WORKER = f"{__package__}.workers.HybridWorker"


def register() -> None:
    """Register the models that think, the check of an engine's settings for them, and how their checkpoints are known.

    Models without thinking modules are not affected. Nor is a version of vLLM that was not tested: nothing is registered
    there, and vLLM refuses a checkpoint with thinking modules, which it then does not know.
    """
    problem = version_problem("vllm")
    if problem and not untested_allowed():
        log.warning("vLLM cannot decode thinking states here: %s", problem)
        return
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    for name in ARCHITECTURES:
        ModelRegistry.register_model(name, f"{__package__}.models:{name}")
        MODELS_CONFIG_MAP[name] = config_check(MODELS_CONFIG_MAP.get(name.removeprefix(PREFIX)))
    patches.apply("vllm_checkpoints")


def config_check(stock: type | None) -> type:
    """Make vLLM's hook that checks the configuration of an engine for a model that thinks.

    Args:
        stock: the hook of the model without thinking modules, which is called first.
    """
    from vllm.model_executor.models.config import VerifyAndUpdateConfig

    class HybridConfig(stock or VerifyAndUpdateConfig):  # type: ignore[misc]
        @classmethod
        def verify_and_update_config(cls, vllm_config: Any) -> None:
            super().verify_and_update_config(vllm_config)
            check_engine(vllm_config)

    return HybridConfig


def check_engine(vllm_config: Any) -> None:
    """Refuse what cannot decode thinking states, and set what they need.

    Prefix caching is switched off: it knows a block by its tokens, and the keys and values of a completion also come
    from thinking states.

    Args:
        vllm_config: vLLM's configuration, which is changed.

    Raises:
        ValueError: a setting does not work with thinking states.
    """
    from vllm.platforms import current_platform

    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    settings = getattr(model.hf_config, "thinking", None) or {}
    soft = settings.get("thinking_source") == "soft_embedding"
    v1 = not vllm_config.use_v2_model_runner
    cache = vllm_config.cache_config
    refused = {
        f"runner={model.runner_type!r}": model.runner_type != "generate",
        f"thinking_source={settings.get('thinking_source')!r}": settings.get("thinking_source") in SOFT_SOURCES,
        "enable_prompt_embeds=True": model.enable_prompt_embeds,
        "speculative_config": vllm_config.speculative_config is not None,
        f"pipeline_parallel_size={parallel.pipeline_parallel_size}": parallel.pipeline_parallel_size > 1,
        f"tensor_parallel_size={parallel.tensor_parallel_size} with soft embeddings": soft
        and parallel.tensor_parallel_size > 1,
        f"decode_context_parallel_size={parallel.decode_context_parallel_size}": parallel.decode_context_parallel_size
        > 1,
        f"prefill_context_parallel_size={parallel.prefill_context_parallel_size}": (
            parallel.prefill_context_parallel_size > 1
        ),
        "enable_dbo=True": parallel.enable_dbo,
        "enable_batch_sharded_sampling=True": parallel.enable_batch_sharded_sampling,
        "kv_transfer_config": vllm_config.kv_transfer_config is not None,
        f"kv_offloading_size={cache.kv_offloading_size}": cache.kv_offloading_size is not None,
        f"worker_cls={parallel.worker_cls!r}": parallel.worker_cls not in ("auto", WORKER),
        "VLLM_USE_V2_MODEL_RUNNER=0": v1 and not current_platform.is_cpu(),
    }
    if not settings:
        raise ValueError(
            "the model has no settings of thinking modules: give hf_overrides={'thinking': {'thinking_source': ...}}"
        )
    if found := [name for name, there in refused.items() if there]:
        raise ValueError(f"{found[0]}: vLLM cannot decode thinking states with it; leave it out")
    check_heads(model.get_head_size())
    cache.enable_prefix_caching = False
    parallel.enable_batch_sharded_sampling = False  # None lets vLLM choose
    parallel.worker_cls = WORKER


def check_heads(size: int) -> None:
    """Raise a ValueError if vLLM has no attention for heads of this size. On a CPU it would say so in the first forward."""
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    known = CPUAttentionBackend.get_supported_head_sizes()
    if size not in known:
        raise ValueError(f"head_dim={size}: vLLM's attention on a CPU needs one of {', '.join(map(str, known))}")
