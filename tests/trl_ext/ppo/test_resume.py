"""Resumed equals uninterrupted, to the bit, inside a rollout and in one that has been left; and what is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.marks import slow
from trl_ext.common.checkpointing import CheckpointError
from trl_ext.ppo.critic import critic_of

from . import setups


SAVING = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5, "lr_scheduler_type": "cosine", "warmup_steps": 1}


@pytest.mark.parametrize(
    "changes",
    [
        slow({"num_iterations": 3}),  # steps 1, 2 and 4 lie inside a rollout
        slow({"num_iterations": 3, "target_kl": 1e-9}),  # which is left at step 2
        {"num_iterations": 2, "steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_generations": 2},
        slow({"num_iterations": 3, "peft_config": setups.lora()}),
    ],
    ids=("rollout", "left", "accumulation", "adapter"),
)
def test_resume_equals_the_uninterrupted_run_bit_for_bit(tmp_path, changes):
    whole = setups.ppo(tmp_path, **SAVING, **changes)
    whole.train()
    for step in (1, 2, 3):
        torch.manual_seed(1234)  # whatever the process did before must not matter
        resumed = setups.ppo(tmp_path, **SAVING, **changes)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        a, b = setups.trained(whole), setups.trained(resumed)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        assert any(name.startswith("critic.") for name in a)
        for name in ("loss", "ppo/stopped", "ppo/value_loss", "ppo/approx_kl"):
            assert setups.logged(whole, name) == setups.logged(resumed, name), name
        state, again = whole._named_state(), resumed._named_state()
        assert state.keys() == again.keys()
        assert all(torch.equal(state[n][k], again[n][k]) for n in state for k in state[n])


def test_a_checkpoint_without_its_critic_is_refused(tmp_path):
    setups.ppo(tmp_path, **{**SAVING, "max_steps": 1}).train()
    file = tmp_path / "out" / "checkpoint-1" / "critic" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"critic/model\.safetensors is truncated"):
        setups.ppo(tmp_path, **SAVING).train(resume_from_checkpoint=str(file.parents[1]))
    file.unlink()
    with pytest.raises(CheckpointError, match="critic holds no critic"):
        setups.ppo(tmp_path, **SAVING).train(resume_from_checkpoint=str(file.parents[1]))


def test_a_checkpoint_of_another_critic_is_refused(tmp_path):
    setups.ppo(tmp_path, **{**SAVING, "max_steps": 1}).train()
    wide = tiny.config("qwen3")
    wide.intermediate_size = 96
    for config, message in (
        (tiny.config("llama"), r"another critic: \['Qwen3ForTokenClassification'\] instead of this run's Llama"),
        (wide, r"critic is of another model: it has .*mlp\.down_proj\.weight \(32, 64\), this one has \(32, 96\)"),
    ):
        other = setups.ppo(tmp_path, critic_model=critic_of(AutoModelForCausalLM.from_config(config)), **SAVING)
        with pytest.raises(CheckpointError, match=message):
            other.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-1"))
