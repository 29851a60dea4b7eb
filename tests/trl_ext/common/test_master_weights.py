"""Beside a model in bfloat16 or in 4 bits every small module learns: float32 in memory, in files, and after a resume."""

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, BitsAndBytesConfig

from tests import tiny
from tests.marks import slow
from tests.trl_ext.concept import setups as concept
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.kv_distill import setups as kv_distill
from tests.trl_ext.latent import setups as latent
from tests.trl_ext.planner import setups as planner
from tests.trl_ext.ppo import setups as ppo
from trl_ext.ppo.critic import critic_of, load_critic, ready
from unsloth_ext import ConceptModel, FastThinkingModel, LatentModel, PlannerExecutorModel
from unsloth_ext.common.master_weights import MasterLinear, master_weights
from unsloth_ext.common.wrapping import backbone_of


BF16 = torch.bfloat16
# The rates of the published runs, in recipes/configs and presets
HRPO = {
    "learning_rate": 5e-6,
    "lr_residual_gate": 1e-4,
    "lr_residual_lambda": 1e-3,
    "lr_thinking_projection": 1e-4,
    "max_grad_norm": 0.1,
    "adam_beta2": 0.99,
    "weight_decay": 0.1,
}
LATENT = {"num_latents": 3, "iterations": 2, "projection_dim": 16, "learning_rate": 1e-3}
STEADY = {"lr_scheduler_type": "constant", "warmup_steps": 0}


def base(folder, config, std=0.1):
    if not (folder / "base").exists():
        tiny.from_config(config, 0, std, BF16).save_pretrained(folder / "base")
        tiny.tokenizer(()).save_pretrained(folder / "base")
    return str(folder / "base")


def three_layers():
    config = tiny.config("qwen3")
    return type(config)(**{**config.to_dict(), "num_hidden_layers": 3, "layer_types": None})


def in_bf16(folder, config=None):
    return AutoModelForCausalLM.from_pretrained(base(folder, config or tiny.config("qwen3")), dtype=BF16)


def made(name, folder, peft, **changes):
    """A trainer of a model that was loaded in bfloat16."""
    changes = {**STEADY, "save_strategy": "steps", **changes}
    if name == "hrpo":
        loaded = FastThinkingModel.from_pretrained(base(folder, tiny.config("qwen3")), 128, BF16, load_in_4bit=False)[0]
        if peft:
            loaded = FastThinkingModel.get_peft_model(loaded, r=4)
        return hrpo.hrpo(folder, model=loaded, peft=False, **{**HRPO, **changes})
    if name == "latent":
        return latent.trainer(folder / "out", peft, model=in_bf16(folder), **{**LATENT, **changes})
    if name == "concept":
        changes = {"learning_rate": 2e-4, "concept_learning_rate": 1e-3, **concept.CASES["autoregressive"], **changes}
        return concept.trainer(folder / "out", peft, model=in_bf16(folder, three_layers()), **changes)
    if name == "planner":
        changes = {"learning_rate": 2e-4, **changes}
        return planner.trainer(folder / "out", peft, model=in_bf16(folder), **changes)
    if name == "kv_distill":
        changes = {"learning_rate": 1e-5, **changes}
        return kv_distill.trainer(folder / "out", peft, model=in_bf16(folder), **changes)
    in_bf16(folder)
    changes = {
        "learning_rate": 1e-6,
        "critic_learning_rate": 1e-5,
        "model_init_kwargs": {"dtype": "bfloat16"},
        **changes,
    }
    return ppo.ppo(folder, model=str(folder / "base"), peft_config=ppo.lora() if peft else None, **changes)


def small(trainer):
    """What of it is float32, by name."""
    found = {p: n for n, p in trainer._named_trained().items()}
    roots = [trainer.model, getattr(trainer, "aligner", None), getattr(trainer, "critic", None)]
    parameters = [p for root in roots if root is not None for p in master_weights(root).values()]
    return {found[p]: p for p in parameters if p.requires_grad and p in found}


CASES = {"hrpo": 6, "latent": 6, "concept": 4, "planner": 2, "kv_distill": 6, "ppo": 2}  # parameters
ROLES = {
    "hrpo": {"gate", "lambda", "projection", "lora"},
    "latent": {"projection", "tokens", "lora"},
    "concept": {"concept_head", "concept_embedding", "lora"},
    "planner": {"planner_head", "lora"},
    "kv_distill": {"aligner", "lora"},
    "ppo": {"critic_head", "lora"},
}


def saved_small(trainer, folder):
    """Tensors of small modules in what a trainer wrote, by the last part of their names."""
    tensors = {}
    for file in folder.rglob("*.safetensors"):
        if file.name in ("adapter_model.safetensors", "model.safetensors", "aligner.safetensors"):
            tensors |= {f"{file.parent.name}.{name}": x for name, x in load_file(file).items()}
    wanted = {n.replace("modules_to_save.default.", "").partition(".")[2] for n in small(trainer)}
    return [x for name, x in tensors.items() if any(name.endswith(n) for n in wanted)]


@pytest.mark.parametrize("name", CASES)
def test_nearly_every_entry_moves_at_the_shipped_rates(tmp_path, name):
    """Of those with a gradient. In bfloat16 a quarter of a gate's did, and none of a LayerNorm's. Files are float32, and
    the log says how far each role has moved, as a plain reference has it."""
    trainer = made(name, tmp_path, True, max_steps=8, logging_steps=4, save_strategy="no")
    assert trainer.model.dtype == BF16
    before = {n: p.detach().clone() for n, p in small(trainer).items()}
    assert len([n for n in before if "tokens_delta" not in n]) == CASES[name]
    trainer.create_optimizer()
    steps = []
    trainer.optimizer.register_step_pre_hook(lambda *_: steps.append([p.detach().clone() for p in of_role(trainer)]))
    trainer.train()
    for parameter_name, parameter in small(trainer).items():
        assert parameter.dtype == torch.float32, parameter_name
        felt = trainer.optimizer.state[parameter]["exp_avg_sq"] > 0
        moved = (parameter != before[parameter_name])[felt].float().mean()
        assert felt.any() and moved > 0.98, (parameter_name, moved)
    logged = [e for e in trainer.state.log_history if any(key.startswith("update/") for key in e)]
    assert [e["step"] for e in logged] == [4, 8]
    assert {key.removeprefix("update/") for key in logged[0] if key.startswith("update/")} == ROLES[name]
    for entry, after in zip(logged, (steps[4], [p.detach() for p in of_role(trainer)])):
        flat = [torch.cat([x.double().flatten() for x in xs]) for xs in (steps[entry["step"] - 1], after)]
        assert entry["update/lora"] == pytest.approx(((flat[1] - flat[0]).norm() / flat[0].norm()).item(), rel=1e-4)
    trainer.save_model(str(tmp_path / "saved"))
    found = saved_small(trainer, tmp_path / "saved")
    assert len(found) >= CASES[name] and {x.dtype for x in found} == {torch.float32}


def test_what_begins_at_zero_has_no_relative_size_at_its_first_step(tmp_path):
    trainer = made("ppo", tmp_path, True, max_steps=2, logging_steps=1, save_strategy="no")
    head = next(p for n, p in trainer._named_trained().items() if n.startswith("critic.score"))
    assert not head.any()
    trainer.train()
    first, second = [{k for k in e if k.startswith("update/")} for e in trainer.state.log_history[:2]]
    assert first == {"update/lora"} and second == {"update/lora", "update/critic_head"}
    assert trainer.state.log_history[1]["update/critic_head"] < 10


def of_role(trainer):
    return [p for n, p in trainer.model.named_parameters() if "lora_" in n and p.requires_grad]


@pytest.mark.parametrize("peft", [True, slow(False)], ids=["adapter", "whole model"])
@pytest.mark.parametrize("name", CASES)
def test_resumed_is_uninterrupted_bit_for_bit(tmp_path, name, peft):
    whole = made(name, tmp_path, peft, max_steps=3, save_steps=2)
    whole.train()
    torch.manual_seed(1234)
    again = made(name, tmp_path, peft, max_steps=3, save_steps=2)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    a, b = whole._named_trained(), again._named_trained()
    assert {n: p.dtype for n, p in a.items()} == {n: p.dtype for n, p in b.items()}
    assert [n for n in a if not torch.equal(a[n], b[n])] == []
    assert {p.dtype for p in small(again).values()} == {torch.float32} and again.model.dtype == BF16
    state, resumed = whole._named_state(), again._named_state()
    assert [n for n in state for k in state[n] if not torch.equal(state[n][k], resumed[n][k])] == []


def test_a_checkpoint_with_small_modules_in_bfloat16_still_resumes(tmp_path):
    made("hrpo", tmp_path, True, max_steps=1, save_steps=1).train()
    folder = tmp_path / "out" / "checkpoint-1"
    for file in ("adapter_model.safetensors", "optimizer.safetensors"):
        tensors = load_file(folder / file)
        narrow = {n: x.to(BF16) if "thinking" in n and x.dim() else x for n, x in tensors.items()}
        save_file(narrow, folder / file, {"format": "pt"})
    trainer = made("hrpo", tmp_path, True, max_steps=2, save_strategy="no")
    trainer.train(resume_from_checkpoint=str(folder))
    for parameter in small(trainer).values():
        assert {x.dtype for x in (parameter, trainer.optimizer.state[parameter]["exp_avg"])} == {torch.float32}


LOADERS = {
    "hrpo": lambda folder: FastThinkingModel.from_pretrained(folder, 128, BF16, load_in_4bit=False)[0],
    "latent": lambda folder: LatentModel.from_pretrained(folder, dtype=BF16).model,
    "concept": lambda folder: ConceptModel.from_pretrained(folder, dtype=BF16).model,
    "planner": lambda folder: PlannerExecutorModel.from_pretrained(folder, dtype=BF16).model,
}


@pytest.mark.parametrize("peft", [True, slow(False)], ids=["adapter", "whole model"])
@pytest.mark.parametrize("name", LOADERS)
def test_loaded_is_what_was_saved_and_folders_in_bfloat16_still_load(tmp_path, name, peft):
    trainer, folder = made(name, tmp_path, peft, max_steps=1, save_strategy="no"), tmp_path / "saved"
    with torch.no_grad():
        for parameter in small(trainer).values():
            parameter.add_(1e-4 * torch.randn_like(parameter))
    trainer.save_model(str(folder))
    trainer.processing_class.save_pretrained(folder)
    kept = {n: p.detach().clone() for n, p in small(trainer).items()}
    loaded = LOADERS[name](str(folder))
    assert loaded.dtype == BF16
    found = dict(loaded.named_parameters())
    for key, value in kept.items():
        assert found[key].dtype == torch.float32 and torch.equal(found[key], value), key
    if peft:
        merged = backbone_of(loaded.merge_and_unload())
        flat = master_weights(merged)
        assert flat and {p.dtype for p in flat.values()} == {torch.float32}
        for key, value in kept.items():
            short = key.replace("modules_to_save.default.", "").partition("model.model.model.")[2]
            assert "tokens_delta" in key or torch.equal(flat[short], value), key
    (file,) = (f for f in folder.glob("*.safetensors"))
    save_file({n: x.to(BF16) for n, x in load_file(file).items()}, file, {"format": "pt"})  # as it was before
    found = dict(LOADERS[name](str(folder)).named_parameters())
    for key, value in kept.items():
        assert found[key].dtype == torch.float32 and torch.equal(found[key], value.to(BF16).float()), key


@pytest.mark.parametrize("name", ["latent", "concept", "planner"])
def test_beside_4_bit_weights_too(tmp_path, name):
    """TRL casts what trains there to bfloat16; it leaves as it came. HRPO's: tests/trl_ext/hrpo/test_trainer.py."""
    folder = base(tmp_path, three_layers())
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=BF16)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=BF16, quantization_config=four_bit)
    maker = {"latent": latent, "concept": concept, "planner": planner}[name]
    changes = {"latent": LATENT, "concept": concept.CASES["autoregressive"], "planner": {}}[name]
    trainer = maker.trainer(tmp_path / "out", True, model=model, **{**changes, **STEADY, "max_steps": 2})
    before = {n: p.detach().clone() for n, p in small(trainer).items()}
    assert any((x != x.to(BF16).float()).any() for x in before.values())  # digits that bfloat16 does not have
    assert len(before) >= CASES[name] and {x.dtype for x in before.values()} == {torch.float32}
    trainer.train()
    assert all((p != before[n]).any() for n, p in small(trainer).items())


def test_a_model_cast_behind_its_back_is_trained_in_float32_with_a_warning(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(logging.getLogger("trl_ext"), "propagate", True)
    model = FastThinkingModel.get_peft_model(
        FastThinkingModel.from_pretrained(base(tmp_path, tiny.config("qwen3")), 128, BF16, load_in_4bit=False)[0], r=4
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(BF16)
    trainer = hrpo.hrpo(tmp_path, model=model, peft=False, max_steps=1)
    assert len(small(trainer)) == 6 and {p.dtype for p in small(trainer).values()} == {torch.float32}
    assert "were cast to half precision" in caplog.text


def test_in_bfloat16_the_ratio_is_no_worse_for_the_thinking(tmp_path):
    """The first inner step: states that matter change no more of p_train / p_rollout than bfloat16 does without them."""
    deviations = {}
    for thinks in (True, False):
        trainer = made("hrpo", tmp_path, True, temperature=0.8)
        if thinks:
            tiny.loud_gates(backbone_of(trainer.model))
        else:
            with torch.no_grad():
                backbone_of(trainer.model).thinking_residual_Lambda.Lambda.fill_(60.0)  # a = 1: nothing is mixed in
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1
        inputs = trainer._prepare_inputs([row for row in trainer.train_dataset.select(range(2)) for _ in range(4)])
        trainer._compute_loss(trainer.model, inputs)
        deviations[thinks] = trainer._metrics["train"]["thinking/ratio_deviation"][0]
    assert deviations[True] <= 2 * deviations[False] + 0.02, deviations


def test_a_critics_head_keeps_its_digits(tmp_path):
    critic = critic_of(tiny.model(dtype=BF16))
    ready(critic, 64, torch.device("cpu"))
    head = next(m for m in critic.modules() if isinstance(m, MasterLinear))
    with torch.no_grad():
        head.weight.normal_()
    critic.save_pretrained(tmp_path / "critic")
    again = load_critic(str(tmp_path / "critic"), BF16, False)
    ready(again, 64, torch.device("cpu"))
    a, b = critic.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)
    assert again.dtype == BF16 and {n: x.dtype for n, x in critic.named_buffers()} == {
        n: x.dtype for n, x in again.named_buffers()
    }
    stock = AutoModelForTokenClassification.from_pretrained(tmp_path / "critic", dtype=torch.float32)
    ids = torch.randint(3, 60, (2, 7))
    assert (stock(ids).logits - again(ids).logits).abs().max() < 0.1
