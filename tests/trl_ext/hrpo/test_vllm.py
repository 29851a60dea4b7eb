"""HRPOTrainer with rollouts in vLLM, in the trainer's process (`vllm_mode="colocate"`)."""

import contextlib
import gc

import pytest
import torch

from tests import tiny
from tests.trl_ext.hrpo import setups
from unsloth_ext.common.wrapping import backbone_of


pytestmark = pytest.mark.vllm


def base(tmp_path, family="qwen2"):
    """A model without thinking modules, with heads that vLLM's attention on CPUs has."""
    folder = tmp_path / f"base-{family}"
    if not folder.exists():
        config = tiny.config(family)
        config.hidden_size, config.head_dim = 128, 32
        tiny.from_config(config, std=0.1).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@contextlib.contextmanager
def hrpo(tmp_path, loud=True, **changes):
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests import vllm_on_cpu  # noqa: F401

    settings = {
        "model": base(tmp_path),
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.05,
        "vllm_max_model_length": 64,
        "recompute": "rollout",
        **changes,
    }
    trainer = setups.hrpo(tmp_path, **settings)
    if loud:
        tiny.loud_gates(backbone_of(trainer.model))
    try:
        yield trainer
    finally:
        trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()
        del trainer
        cleanup_dist_env_and_memory()
        gc.collect()


def test_it_trains_and_the_ratio_is_one(tmp_path):
    """Rollouts of each step come from the weights of that step: the ratio stays 1 while all weights change."""
    with hrpo(tmp_path, lr_thinking_projection=1e-2, lr_residual_gate=1e-2) as trainer:
        before = setups.parameters(trainer)
        trainer.train()
        changed = {name for name, value in setups.parameters(trainer).items() if not torch.equal(value, before[name])}
        for part in ("lora_", "thinking_projection", "gate_r", "gate_i", "Lambda"):
            assert any(part in name for name in changed), part
        logs = [entry for entry in trainer.state.log_history if "thinking/ratio_deviation" in entry]
        assert len(logs) == 3
        for entry in logs:
            assert entry["thinking/ratio_deviation"] < 1e-5
            assert abs(entry["sampling/importance_sampling_ratio/mean"] - 1) < 1e-5
            assert 0 < entry["thinking/fraction"] <= 1
