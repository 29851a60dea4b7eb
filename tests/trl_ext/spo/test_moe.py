"""Policies that are mixtures of experts: resuming, and the auxiliary loss, as in stock GRPO."""

import math

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer

from tests import moe, tiny
from trl_ext import SPOConfig, SPOTrainer

from . import setups


def spo(folder, kind, **changes):
    args = setups.arguments(SPOConfig, folder, **{"num_generations": 1, "per_device_train_batch_size": 4, **changes})
    return SPOTrainer(
        moe.model(kind, std=0.1),
        setups.reward_digits,
        args,
        train_dataset=setups.prompts(12),
        processing_class=tiny.tokenizer(),
    )


def grpo(folder, kind, **changes):
    return GRPOTrainer(
        moe.model(kind, std=0.1),
        setups.reward_digits,
        setups.arguments(GRPOConfig, folder, **changes),
        train_dataset=setups.prompts(12),
        processing_class=tiny.tokenizer(),
    )


def test_resumed_is_uninterrupted(tmp_path):
    """At steps 1 and 2 of 4, one inside a rollout, to the bit; the experts learn."""
    saving = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4, "num_iterations": 2}
    whole = spo(tmp_path, "minimind3-moe", **saving)
    before = moe.experts(whole.model)
    whole.train()
    after = setups.parameters(whole)
    for step in (1, 2):
        resumed = spo(tmp_path, "minimind3-moe", **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        again = setups.parameters(resumed)
        assert [name for name in after if not torch.equal(after[name], again[name])] == []
        assert torch.equal(whole.tracker.a, resumed.tracker.a)
    assert before and not any(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("make", [spo, grpo])
@pytest.mark.parametrize("kind", moe.KINDS)
def test_the_auxiliary_loss_is_part_of_the_step(tmp_path, make, kind):
    """Logged, finite, and each router takes another step than without it."""
    trainers = {}
    for coefficient in (0.0, 0.5):
        trainer = make(
            tmp_path,
            kind,
            max_steps=1,
            router_aux_loss_coef=coefficient,
            optim="sgd",
            learning_rate=1.0,
            max_grad_norm=0.0,
        )
        trainer.train()
        trainers[coefficient] = trainer
    (aux,) = [entry["aux_loss"] for entry in trainers[0.5].state.log_history if "aux_loss" in entry]
    assert math.isfinite(aux) and aux >= 0.5
    without, with_it = (moe.routers(trainer.model) for trainer in trainers.values())
    assert all((without[name] - with_it[name]).abs().max() > 1e-4 for name in without)
