"""Policies that are mixtures of experts: the auxiliary loss, and resuming, with a critic that is one too."""

import math

import pytest
import torch
from transformers import AutoModelForTokenClassification

from tests import moe, tiny

from . import setups


def folder_of(tmp_path, kind):
    """A policy's; PPO loads it by name."""
    folder = tmp_path / kind
    if not folder.exists():
        moe.model(kind, std=0.1).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def critic():
    torch.manual_seed(3)
    config = tiny.config("qwen3")
    config.num_labels = 1
    return AutoModelForTokenClassification.from_config(config)


def test_resumed_is_uninterrupted(tmp_path):
    """Inside a rollout and after one, to the bit; the critic, made from the policy, is a mixture too, and both learn."""
    saving = {
        "model": folder_of(tmp_path, "minimind3-moe"),
        "save_strategy": "steps",
        "save_steps": 1,
        "max_steps": 4,
        "num_iterations": 2,
    }
    whole = setups.ppo(tmp_path, **saving)
    before = setups.trained(whole)
    whole.train()
    after = setups.trained(whole)
    for step in (1, 2):
        torch.manual_seed(1234)
        resumed = setups.ppo(tmp_path, **saving)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        again = setups.trained(resumed)
        assert after.keys() == again.keys() and [n for n in after if not torch.equal(after[n], again[n])] == []
        for name in ("loss", "aux_loss", "ppo/value_loss"):
            assert setups.logged(whole, name) == setups.logged(resumed, name), name
    experts = [name for name in after if ".experts." in name]
    assert any(name.startswith("critic.") for name in experts) and any(name.startswith("model.") for name in experts)
    assert not any(torch.equal(before[name], after[name]) for name in experts)


@pytest.mark.parametrize("kind", moe.KINDS)
def test_the_auxiliary_loss_is_part_of_the_step(tmp_path, kind):
    """Logged, in the loss to 1e-4, and in each router's step; the critic is dense, for Granite has no token classifier."""
    trainers = {}
    for coefficient in (0.0, 0.5):
        trainer = setups.ppo(
            tmp_path,
            model=folder_of(tmp_path, kind),
            critic_model=critic(),
            max_steps=1,
            max_grad_norm=0.0,
            optim="sgd",
            learning_rate=1.0,
            rollout_func=setups.rollouts,
            router_aux_loss_coef=coefficient,
        )
        trainer.train()
        trainers[coefficient] = trainer
    (aux,) = setups.logged(trainers[0.5], "aux_loss")
    assert math.isfinite(aux) and aux >= 0.5 and not setups.logged(trainers[0.0], "aux_loss")
    losses = [setups.losses(trainer)[0] for trainer in trainers.values()]
    assert losses[1] - losses[0] == pytest.approx(0.5 * aux, abs=1e-4)
    without, with_it = (moe.routers(trainer.model) for trainer in trainers.values())
    assert all((without[n] - with_it[n]).abs().max() > 1e-4 for n in without)
