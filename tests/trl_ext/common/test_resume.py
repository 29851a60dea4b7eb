"""Resumed is uninterrupted, bit for bit, in every trainer that may hold several adapters, a reference, or a module beside
the model: of a `PeftModel`, a bare model with `peft_config`, and a full one."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOConfig, GRPOTrainer

from patches import fused_lm_head
from tests import tiny
from tests.trl_ext.concept import setups as concept
from tests.trl_ext.distill import setups as distill
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv
from tests.trl_ext.latent import setups as latent
from tests.trl_ext.planner import setups as planner
from tests.trl_ext.ppo import setups as ppo
from tests.trl_ext.spo import setups as spo
from trl_ext.common.grpo_checkpointing import GRPOCheckpointMixin
from trl_ext.minimind.stage import resumable


SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
NONE, KL = {"beta": 0.0}, {"beta": 0.05}
MOVING = {"beta": 0.05, "sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.3}
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def lora():
    return LoraConfig(**LORA)


def wrapped(model):
    """A `PeftModel` with an adapter that has learnt a little."""
    torch.manual_seed(3)
    model = get_peft_model(model, lora())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    return model


def rl(make):
    """(folder, kind of model, settings) -> trainer, of a maker that takes `model`, `peft_config` and settings."""

    def made(folder, kind, **changes):
        base = hrpo.base_folder(folder)
        model = wrapped(AutoModelForCausalLM.from_pretrained(base)) if kind == "PeftModel" else base
        return make(folder, model, lora() if kind == "peft_config" else None, **{**SAVING, **changes})

    return made


def make_hrpo(folder, model, peft, **changes):
    from trl_ext import HRPOConfig, HRPOTrainer

    args = hrpo.arguments(HRPOConfig, folder / "out", **{"answer_delimiter": "#", **changes})
    return HRPOTrainer(
        model,
        hrpo.reward_digits,
        args,
        train_dataset=hrpo.prompts(),
        processing_class=tiny.tokenizer(),
        peft_config=peft,
    )


def make_spo(folder, model, peft, **changes):
    from trl_ext import SPOConfig, SPOTrainer

    changes = {"num_generations": 1, "per_device_train_batch_size": 4, **changes}
    return SPOTrainer(
        model,
        spo.reward_digits,
        hrpo.arguments(SPOConfig, folder / "out", **changes),
        train_dataset=hrpo.prompts(12),
        processing_class=tiny.tokenizer(),
        peft_config=peft,
    )


def make_ppo(folder, model, peft, **changes):
    return ppo.ppo(folder, model=model, peft_config=peft, **changes)


def make_grpo(folder, model, peft, **changes):
    fused_lm_head.ensure()
    return resumable(GRPOTrainer, GRPOCheckpointMixin)(
        model,
        hrpo.reward_digits,
        hrpo.arguments(GRPOConfig, folder / "out", **changes),
        train_dataset=hrpo.prompts(),
        processing_class=tiny.tokenizer(),
        peft_config=peft,
    )


RL = {"hrpo": rl(make_hrpo), "spo": rl(make_spo), "ppo": rl(make_ppo), "grpo": rl(make_grpo)}
SLOW = pytest.mark.slow


def reinforcement_cases():
    for name in RL:
        for kind, changes in itertools.product(("PeftModel", "peft_config", "full"), (NONE, KL, MOVING)):
            if changes == MOVING and kind != "full":  # which TRL refuses
                continue
            fast = (kind, changes) == ("PeftModel", KL) or (name, changes) == ("hrpo", MOVING)
            label = f"{name}-{kind}-{'moving' if changes == MOVING else changes['beta']}"
            yield pytest.param(name, kind, changes, id=label, marks=() if fast else SLOW)


def everything(trainer):
    """All that a run holds: the model, with every adapter, what is beside it, a reference, the optimizer's state."""
    named = {name: x.detach().clone() for name, x in trainer.model.state_dict().items()}
    named |= {name: x.detach().clone() for name, x in trainer._named_trained().items()}
    reference = getattr(trainer, "ref_model", None)
    named |= {f"ref_model.{n}": x.clone() for n, x in (reference.state_dict() if reference else {}).items()}
    state = trainer._named_state() if trainer.optimizer else {}
    return named | {f"{n}|{k}": x.clone() for n, s in state.items() for k, x in s.items()}


def assert_same(whole, again):
    a, b = everything(whole), everything(again)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    return a


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name, kind, changes", reinforcement_cases())
def test_reinforcement(tmp_path, name, kind, changes):
    whole = RL[name](tmp_path, kind, **changes)
    before = everything(whole)
    whole.train()
    torch.manual_seed(1234)  # whatever the process did before must not matter
    again = RL[name](tmp_path, kind, **changes)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    after = assert_same(whole, again)
    assert losses(whole)[2:] == losses(again)[2:]
    moved = {n for n in before if n in after and not torch.equal(before[n], after[n])}
    assert any("q_proj" in n and "ref" not in n for n in moved)
    if changes == MOVING:
        assert any(n.startswith("ref_model.") for n in moved)
    if kind == "PeftModel" and changes == KL:
        assert set(whole.model.peft_config) == {"default", "ref"} and not any(".ref." in n for n in moved)


@pytest.mark.parametrize("name", ["grpo", "hrpo", pytest.param("ppo", marks=SLOW), pytest.param("spo", marks=SLOW)])
def test_the_second_epochs_order_is_the_second_epochs(tmp_path, monkeypatch, name):
    """TRL's sampler begins anew, with the order of the first; from the middle of the epoch, and from its beginning."""
    rows = hrpo.prompts(8 if name == "spo" else 4)  # two steps an epoch; PPO takes each rollout twice
    monkeypatch.setattr(hrpo, "prompts", lambda *_: rows)
    monkeypatch.setattr(ppo, "prompts", lambda *_: rows)
    changes = {**NONE, "save_steps": 1, "max_steps": 5}
    whole = RL[name](tmp_path, "peft_config", **changes)
    whole.train()
    for step in (2, 3):
        again = RL[name](tmp_path, "peft_config", **changes)
        again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{step}"))
        assert whole.state.epoch == 2.5
        assert_same(whole, again)


@pytest.mark.parametrize("name", ["grpo", pytest.param("hrpo", marks=SLOW), pytest.param("ppo", marks=SLOW)])
def test_another_reference_is_told_of(tmp_path, caplog, name):
    """A whole model's is loaded from where the policy is: of a checkpoint given as the model, it is the checkpoint."""
    whole = RL[name](tmp_path, "full", **KL)
    whole.train()
    checkpoint = tmp_path / "out" / "checkpoint-2"
    whole.processing_class.save_pretrained(checkpoint)
    RL[name](tmp_path, "full", **KL)._check_checkpoint(checkpoint)
    assert "another reference" not in caplog.text
    again = {"grpo": make_grpo, "hrpo": make_hrpo, "ppo": make_ppo}[name](
        tmp_path, str(checkpoint), None, **SAVING, **KL
    )
    again._check_checkpoint(checkpoint)
    assert f"was trained with another reference model (beta=0.05) than {checkpoint}, which" in caplog.text


def test_a_trainer_that_has_trained_resumes_too(tmp_path):
    """As in a notebook: its optimizer is accelerate's by then."""
    trainer = RL["hrpo"](tmp_path, "peft_config", **KL)
    trainer.train()
    wanted, before = everything(trainer), trainer.state.log_history
    trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    found = everything(trainer)
    assert wanted.keys() == found.keys() and [n for n in wanted if not torch.equal(wanted[n], found[n])] == []
    sizes = [{k: v for k, v in log[3].items() if "update/" in k} for log in (before, trainer.state.log_history)]
    assert sizes[0] and sizes[0] == sizes[1]


SUPERVISED = {
    "kv": (kv.trainer, {}),
    "logits": (distill.logits, {}),
    "reasoning": (distill.reasoning, {}),
    "latent": (latent.trainer, latent.CASES["sequential"]),
    "concept": (concept.trainer, concept.CASES["threshold"]),
    "planner": (planner.trainer, {"training": "hard_em"}),
}


FAST = ("kv", "reasoning")  # a module beside the model, and trained rows of the embedding


def supervised_cases():
    return [pytest.param(name, marks=() if name in FAST else SLOW) for name in SUPERVISED]


@pytest.mark.parametrize("name", supervised_cases())
def test_supervised(tmp_path, name):
    """Of a `PeftModel` that was trained before and has a second adapter, which is not trained. (Bare and full models: in
    the tests of each trainer.)"""
    make, changes = SUPERVISED[name]

    def made():
        first = make(tmp_path / "first", peft=True, **changes)
        with torch.no_grad():
            for parameter in first.model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
        first.model.add_adapter("other", first.model.peft_config["default"])
        return make(
            tmp_path,
            model=first.model,
            peft=False,
            **changes,
            **SAVING,
            **({"tokenizer": first.processing_class} if name == "reasoning" else {}),
        )

    whole = made()
    before = everything(whole)
    whole.train()
    again = made()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    after = assert_same(whole, again)
    assert losses(whole)[2:] == losses(again)[2:]
    moved = {n for n in before if n in after and not torch.equal(before[n], after[n])}
    assert any("lora_B.default" in n for n in moved) and not any(".other." in n for n in moved)
