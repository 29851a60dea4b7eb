"""HRPOTrainer with rollouts in vLLM."""

import contextlib
import gc
from pathlib import Path

import pytest
import torch
import trl
from transformers import AutoConfig, AutoModelForCausalLM

from patches import fused_lm_head
from tests import tiny
from tests.trl_ext.hrpo import setups
from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.hrpo.vllm.slots import TRACE


pytestmark = pytest.mark.vllm
RATIO = 1e-5  # float32; the same sums in another order
CORE = ("lora_", "thinking_projection", "gate_r", "gate_i", "Lambda")
FAST = {"lr_thinking_projection": 1e-2, "lr_residual_gate": 1e-2}


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
def trainer_of(make, tmp_path, **changes):
    """A trainer whose engine is gone at the end of the block."""
    from vllm.distributed import cleanup_dist_env_and_memory

    from tests import vllm_on_cpu

    settings = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_gpu_memory_utilization": 0.05,
        "vllm_max_model_length": 64,
        **changes,
    }
    trainer = make(tmp_path, **settings)
    try:
        assert trainer.vllm_generation.llm.llm_engine.vllm_config.use_v2_model_runner == vllm_on_cpu.V2
        yield trainer
    finally:
        trainer.vllm_generation.llm.llm_engine.engine_core.shutdown()
        del trainer
        cleanup_dist_env_and_memory()
        gc.collect()


@contextlib.contextmanager
def hrpo(tmp_path, **changes):
    with trainer_of(setups.hrpo, tmp_path, **{"model": base(tmp_path), **changes}) as trainer:
        tiny.loud_gates(backbone_of(trainer.model))
        yield trainer


def changed(trainer, before):
    return {name for name, value in setups.parameters(trainer).items() if not torch.equal(value, before[name])}


def check_ratios(trainer, steps=3):
    """Rollouts of each step come from the weights of that step, so the ratio stays 1 while all weights change."""
    logs = [entry for entry in trainer.state.log_history if "thinking/ratio_deviation" in entry]
    assert len(logs) == steps
    for entry in logs:
        assert entry["thinking/ratio_deviation"] < RATIO
        assert abs(entry["sampling/importance_sampling_ratio/mean"] - 1) < RATIO
        assert 0 < entry["thinking/fraction"] <= 1


def test_the_ratio_is_one_while_all_weights_change(tmp_path):
    with hrpo(tmp_path, **FAST) as trainer:
        before = setups.parameters(trainer)
        trainer.train()
        assert all(any(part in name for name in changed(trainer, before)) for part in CORE)
        check_ratios(trainer)


def test_a_model_without_a_name_is_refused(tmp_path):
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base(tmp_path)))
    model.config._name_or_path = model.name_or_path = ""
    with (
        pytest.raises(ValueError, match="vLLM opens the model by its name, and this one has none"),
        hrpo(tmp_path, model=model),
    ):
        pass


def test_weights_that_change_without_a_step_are_pushed(tmp_path):
    """A second `train` begins at the step of the first rollout. And end tokens and tokenizer are the trainer's."""
    for file in Path(base(tmp_path)).glob("*token*"):
        file.unlink()
    with hrpo(tmp_path, **FAST, max_steps=1, max_completion_length=40) as trainer:
        end, generate, completions = 7, trainer._generate_single_turn, []

        def seeing(*args, **kwargs):
            out = generate(*args, **kwargs)
            completions.extend(out[0])
            return out

        trainer.eos_token_ids, trainer._generate_single_turn = [*trainer.eos_token_ids, end], seeing
        for _ in range(2):
            trainer.train()
            check_ratios(trainer, steps=1)
        assert any(completion[-1] == end for completion in completions)
        assert not any(end in completion[:-1] for completion in completions)


@pytest.mark.slow
def test_modules_that_are_not_pushed_are_noticed(tmp_path, monkeypatch):
    """What the test above would show if an update did not reach the engine."""
    from unsloth_ext.hrpo.vllm.models import HybridModel

    with hrpo(tmp_path, **FAST, max_steps=2) as trainer:
        whole = HybridModel.load_weights

        def without_modules(self, weights):
            step = trainer.state.global_step
            return whole(self, (pair for pair in weights if not step or "thinking_" not in pair[0]))

        monkeypatch.setattr(HybridModel, "load_weights", without_modules)
        trainer.train()
        first, second = (e["thinking/ratio_deviation"] for e in trainer.state.log_history if "reward" in e)
        assert first < RATIO < 1e-3 < second


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"thinking_source": "soft_embedding", "recompute": "rollout", "temperature": 0.8, "beta": 0.1, "peft": False},
        {"recompute": "frozen", "beta": 0.1, "thinking_norm": "embedding_rms", "num_iterations": 2, "max_steps": 4},
    ],
    ids=["soft embeddings, all weights, a reference model", "frozen, an adapter, two inner steps"],
)
def test_other_rollouts(tmp_path, changes):
    with hrpo(tmp_path, **FAST, **changes) as trainer:
        before = setups.parameters(trainer)
        trainer.train()
        assert changed(trainer, before)
        first = [entry for entry in trainer.state.log_history if "reward" in entry]  # of each rollout
        assert len(first) == (2 if "num_iterations" in changes else 3)
        assert all(entry["thinking/ratio_deviation"] < RATIO for entry in first)


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapter",
    [
        {"use_dora": True},
        {"use_rslora": True, "lora_alpha": 32},
        {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},  # the model's are tied
        {"bias": "lora_only"},
    ],
    ids=str,
)
def test_what_an_adapter_changes_is_pushed(tmp_path, adapter):
    with hrpo(tmp_path, **FAST, peft=setups.lora(**adapter), learning_rate=1e-2) as trainer:
        before = setups.parameters(trainer)
        trainer.train()
        assert changed(trainer, before)
        check_ratios(trainer)


@pytest.mark.parametrize(
    "adapter, message",
    [
        ({"modules_to_save": ["embed_tokens"]}, "the adapter changes one of the model's tied embeddings"),
        ({"modules_to_save": ["embed_tokens", "lm_head"]}, "the adapter changes one of the model's tied embeddings"),
        ({"target_modules": ["embed_tokens"]}, "the adapter changes one of the model's tied embeddings"),
        ({"trainable_token_indices": [5]}, "TRL cannot push trainable_token_indices"),
    ],
)
def test_an_adapter_that_cannot_be_pushed_is_refused(tmp_path, adapter, message):
    with pytest.raises(ValueError, match=message), hrpo(tmp_path, peft=setups.lora(**adapter)):
        pass


@pytest.mark.slow
def test_evaluation_has_its_own_number_of_completions(tmp_path):
    with hrpo(tmp_path, num_generations_eval=2, per_device_eval_batch_size=4, max_steps=1) as trainer:
        trainer.eval_dataset = setups.prompts(4)
        found = trainer.evaluate(setups.prompts(4))
        assert found["eval_thinking/ratio_deviation"] < RATIO and found["eval_sampling/importance_sampling_ratio/mean"]


def test_an_engine_that_fails_ends_the_run_with_a_sentence(tmp_path, monkeypatch):
    with hrpo(tmp_path, max_steps=4, save_strategy="steps", save_steps=1) as trainer:
        engine = trainer.vllm_generation.llm
        whole = engine.generate

        def generate(*args, **kwargs):
            if trainer.state.global_step == 2:
                raise RuntimeError("out of memory")
            return whole(*args, **kwargs)

        monkeypatch.setattr(engine, "generate", generate)
        with pytest.raises(
            RuntimeError, match=r"the vLLM engine failed in the rollout of step 3.*checkpoint-2: resume"
        ):
            trainer.train()
        assert TRACE not in str(trainer.vllm_generation.generation_kwargs)  # a later rollout asks for its own
        assert (tmp_path / "out" / "checkpoint-2" / "adapter_model.safetensors").exists()


def test_settings_that_vllm_refuses_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"generation_kwargs: vLLM refuses them: .*min_tokens"):
        setups.hrpo(tmp_path, model=base(tmp_path), use_vllm=True, generation_kwargs={"min_tokens": -1})
    with (
        hrpo(tmp_path, vllm_max_model_length=8, max_steps=1) as trainer,
        pytest.raises(
            ValueError, match=r"vLLM refused the rollout of step 1: .*; correct vllm_max_model_length or gen"
        ),
    ):
        trainer.train()


def test_without_thinking_it_is_trls_trainer(tmp_path, monkeypatch):
    """Every loss and every parameter, bit for bit. vLLM's build for CPUs drops the weights that TRL would write to."""
    from vllm.model_executor.layers import utils

    def keep(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", keep)
    with pytest.raises(ValueError, match="TRL cannot push weights to vLLM's build for CPUs, which packs them"):
        setups.hrpo(tmp_path, model=base(tmp_path), thinking=False, use_vllm=True)
    monkeypatch.setattr("trl_ext.hrpo.trainer.check_vllm_rollouts", lambda args: None)
    fused_lm_head.ensure()  # TRL's kernel needs a GPU

    def stock(folder, *, model, **changes):
        args = setups.arguments(trl.GRPOConfig, folder / "out", **changes)
        return trl.GRPOTrainer(
            model,
            setups.reward_digits,
            args,
            train_dataset=setups.prompts(),
            processing_class=tiny.tokenizer(),
            peft_config=setups.lora(),
        )

    found = []
    for make, changes in ((stock, {}), (setups.hrpo, {"thinking": False})):
        with trainer_of(make, tmp_path, model=base(tmp_path), **changes) as trainer:
            trainer.train()
            found.append((setups.losses(trainer), setups.parameters(trainer)))
    (losses, weights), (ours, our_weights) = found
    assert losses == ours and any(losses)
    assert all(torch.equal(value, our_weights[name]) for name, value in weights.items())


@pytest.mark.slow
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path):
    """The engine draws from the generators of the trainer's process, which are saved, and a push rounds no weight."""
    saving = {**FAST, "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    found = []
    for checkpoint in (None, str(tmp_path / "out" / "checkpoint-2")):
        with hrpo(tmp_path, **saving) as trainer:
            trainer.train(resume_from_checkpoint=checkpoint)
            found.append((setups.losses(trainer)[2:], setups.parameters(trainer)))
    (losses, weights), (again, same) = found
    assert losses == again
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
