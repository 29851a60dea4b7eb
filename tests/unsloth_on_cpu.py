"""Import this first in a process of its own: Unsloth's CUDA-branch code, running on a CPU.

`UNSLOTH_ALLOW_CPU=1` is Unsloth's own switch for machines without a driver. What is left to do by hand: give it one
"device", put its rotary cache on the CPU, replace its Triton kernels with torch twins, and let it rewrite TRL's trainer.
Not covered: CUDA graphs, flash attention and xformers, 4-bit weights, and, unless `ON_CPU_COMPILE=1`, `torch.compile`.
"""

import atexit
import gc
import os
import shutil
import sys
import tempfile
import types


_cache = tempfile.mkdtemp(prefix="unsloth_compiled_cache")
atexit.register(shutil.rmtree, _cache, ignore_errors=True)
_eager = "0" if os.environ.get("ON_CPU_COMPILE") == "1" else "1"
os.environ.update(
    UNSLOTH_ALLOW_CPU="1",
    UNSLOTH_COMPILE_DISABLE=_eager,
    UNSLOTH_DISABLE_STATISTICS="1",
    UNSLOTH_COMPILE_LOCATION=_cache,
    TORCHDYNAMO_DISABLE=_eager,
    HF_HUB_OFFLINE="1",
    ACCELERATE_MIXED_PRECISION="no",
    OMP_NUM_THREADS="1",  # tiny models: a thousand times faster than with many threads
)
import torch  # noqa: E402


torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(
    name="cpu", total_memory=2**33, major=8, minor=0, multi_processor_count=1
)
from unsloth import FastLanguageModel, PatchFastRL  # noqa: E402
from unsloth.models import llama  # noqa: E402


def rms_layernorm(layernorm, x, gemma=False, save_output=False, reuse_grad=False):
    """Twin of `fast_rms_layernorm`: (..., d) -> (..., d)."""
    eps = layernorm.variance_epsilon if hasattr(layernorm, "variance_epsilon") else layernorm.eps
    normed = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    return (normed * (layernorm.weight.float() + 1)).to(x.dtype) if gemma else normed.to(x.dtype) * layernorm.weight


def rope_embedding(q, k, cos, sin, rope_embedding_indices=None):
    """Twin of `fast_rope_embedding`: q, k (B, heads, T, head_dim), cos and sin (positions, head_dim)."""
    cos, sin = cos.squeeze(), sin.squeeze()
    if rope_embedding_indices is None:
        at = torch.arange(q.shape[2], device=q.device)[None]
    else:
        at = rope_embedding_indices.reshape(-1, q.shape[2]).long()
    half = q.shape[-1] // 2
    cos, sin = (torch.cat([x[at][..., :half]] * 2, dim=-1)[:, None] for x in (cos, sin))
    turn = lambda x: torch.cat([-x[..., half:], x[..., :half]], dim=-1)  # noqa: E731
    return tuple((x * cos + turn(x) * sin).to(x.dtype) for x in (q, k))


def _prepare() -> None:
    twins = {
        llama.fast_rms_layernorm: rms_layernorm,
        llama.fast_rope_embedding: rope_embedding,
    }
    for name, module in list(sys.modules.items()):
        if not name.startswith("unsloth."):
            continue
        for attribute, value in list(vars(module).items()):
            if isinstance(value, types.FunctionType) and value in twins:
                setattr(module, attribute, twins[value])
        if getattr(module, "DEVICE_COUNT", None) == 0:
            module.DEVICE_COUNT = 1
        if name.startswith("unsloth.models.") and hasattr(module, "DEVICE_TYPE_TORCH"):
            module.DEVICE_TYPE_TORCH = "cpu"
        if name.startswith("unsloth.models.") and hasattr(module, "get_current_device"):
            module.get_current_device = lambda: torch.device("cpu", 0)
    rope = llama._PerDeviceRopeCache
    ensure, cached = rope._ensure_rope_cache, rope.get_cached

    def build_on_cpu(self, index):
        size = self.current_rope_size
        with self._rope_build_mode():
            self._set_cos_sin_cache(self._rope_cache_rows(), torch.device("cpu", 0), self._rope_cache_dtype)
        self.current_rope_size, self._rope_cache_versions[index] = size, self._rope_cache_version

    rope._build_rope_cache = build_on_cpu
    rope._ensure_rope_cache = lambda self, index=None: ensure(self, 0 if index is None else index)
    rope.get_cached = lambda self, seq_len=None, index=None: cached(self, seq_len, 0 if index is None else index)
    os.environ["UNSLOTH_ALLOW_CPU"] = "0"  # or it would leave TRL's trainers alone
    PatchFastRL("GRPO", FastLanguageModel)
    os.environ["UNSLOTH_ALLOW_CPU"] = "1"


_prepare()
gc.freeze()  # Unsloth collects garbage ten times for each model; what was imported is none
