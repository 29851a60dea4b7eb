"""HRPOTrainer: the facts of the method that need a trainer, and what a drop-in owes its parent."""

import functools
import json
import math

import pytest
import torch
import trl
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig

from tests import tiny
from trl_ext import HRPOConfig, HRPOTrainer
from trl_ext.hrpo.monitors import projection_weight
from trl_ext.hrpo.trainer import _fit
from unsloth_ext import FastThinkingModel, attach_thinking, backbone_of, has_thinking
from unsloth_ext.hrpo.decoding import ThinkingTrace
from unsloth_ext.hrpo.recompute import previous_hidden, thinking_keywords
from unsloth_ext.hrpo.states import project

from . import setups


MODES = [
    ("projection", "frozen"),
    ("projection", "rollout"),
    ("projection", "two_pass"),
    ("projection", "jacobi"),
    ("soft_embedding", "frozen"),
    ("soft_embedding", "rollout"),
    ("soft_embedding", "two_pass"),
    ("soft_embedding", "soft_bptt"),
    ("soft_embedding", "jacobi"),
]


def loud(trainer):
    """Gates and projection (PEFT's trained copies) that make the states matter."""
    torch.manual_seed(0)
    backbone = backbone_of(trainer.model)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            if "modules_to_save" in name or ("thinking" in name and not hasattr(trainer.model, "peft_config")):
                parameter.normal_(mean=-1.0 if "Lambda" in name else 0.0, std=0.3)


def one_batch(trainer):
    trainer.model.train()
    return trainer._prepare_inputs([row for row in trainer.train_dataset.select(range(2)) for _ in range(4)])


@pytest.mark.parametrize("source, mode", MODES)
def test_every_mode_trains_and_saves_and_loads(tmp_path, source, mode):
    """Finite losses; LoRA, gates and Lambda move; the projection moves exactly when a gradient can reach it."""
    trainer = setups.hrpo(tmp_path, thinking_source=source, recompute=mode, jacobi_iterations=2, beta=0.01)
    before = setups.parameters(trainer)
    trainer.train()
    after = setups.parameters(trainer)
    assert all(torch.isfinite(torch.tensor(setups.losses(trainer))))
    moved = {name for name in after if not torch.equal(before[name], after[name])}
    assert any("lora_B" in name for name in moved)
    for part in ("gate_r", "gate_i", "Lambda"):
        assert any(part in name for name in moved), part
    reaches = source == "projection" and mode != "frozen"
    assert any("thinking_projection.modules_to_save" in name for name in moved) == reaches
    assert not any("original_module" in name or "base_layer" in name for name in moved)
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert any("thinking_residual_Lambda" in name for name in saved)
    thinking = json.loads((tmp_path / "saved" / "latent_reasoning.json").read_text())["settings"]
    assert thinking["thinking_source"] == source


@pytest.mark.parametrize("given", ["name", "model", "adapter"])
def test_beside_4_bit_weights_lambda_moves_by_less_than_bf16_can_tell(tmp_path, given):
    """TRL casts what trains beside them to bf16: Lambda, at about 4, would then move by 1/64 or not at all. What it was
    given with is kept to the bit."""
    pytest.importorskip("bitsandbytes")
    four_bit = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True), "dtype": torch.bfloat16}
    name = setups.base_folder(tmp_path)
    model = None if given == "name" else FastThinkingModel.from_pretrained(name, 128, load_in_4bit=True)[0]
    if given == "adapter":
        model = FastThinkingModel.get_peft_model(model, r=4)
    wanted = model and backbone_of(model).thinking_residual_Lambda.Lambda.detach().clone()
    changes = {"lr_residual_lambda": 1e-4, "bf16": True, **({"model_init_kwargs": four_bit} if model is None else {})}
    trainer = setups.hrpo(tmp_path, model=model, peft=given != "adapter", **changes)
    moving = backbone_of(trainer.model).thinking_residual_Lambda.Lambda
    assert moving.dtype == torch.float32 and (wanted is None or torch.equal(moving, wanted))
    before = moving.detach().clone()
    trainer.train()
    assert 0 < (moving - before).abs().max() < 1e-3


@pytest.mark.parametrize("source, mode", [m for m in MODES if m[1] in ("frozen", "rollout", "soft_bptt")])
def test_importance_ratio_is_1_at_the_first_inner_step(tmp_path, source, mode):
    """Fact 1 through the trainer: |p_train / p_rollout - 1| <= 1e-5 with states that matter; left padding, ragged rows."""
    trainer = setups.hrpo(tmp_path, thinking_source=source, recompute=mode, temperature=0.8)
    loud(trainer)
    inputs = one_batch(trainer)
    assert (inputs["prompt_mask"] == 0).any() and (inputs["completion_mask"] == 0).any()
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, inputs)
    assert trainer._metrics["train"]["thinking/ratio_deviation"][0] <= 1e-5
    # The same rows without their states are another policy: the check can fail
    blind = {**inputs, "thinking_mask": torch.zeros_like(inputs["thinking_mask"])}
    trainer._compute_loss(trainer.model, blind)
    (largest,) = trainer._metrics["train"]["thinking/ratio_deviation"]
    assert largest > 1e-2


def test_jacobi_equals_sequential_recomputation_after_the_weights_changed(tmp_path):
    """Fact 3: K = completion length, states one position after the other as the reference; fp32, <= 1e-5."""
    trainer = setups.hrpo(tmp_path, recompute="jacobi", jacobi_iterations=12)
    loud(trainer)
    inputs = one_batch(trainer)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    saved = ThinkingTrace(inputs["thinking_mask"], None, inputs["hidden_states"])
    shared = {"input_ids": ids, "attention_mask": attention}
    backbone, length = backbone_of(trainer.model), saved.thinking_mask.shape[1]
    with torch.no_grad():
        states = torch.zeros_like(saved.hidden_states)
        for t in range(length):
            hidden = previous_hidden(
                trainer.model, length, **shared, thinking_mask=saved.thinking_mask, thinking_embeds=states
            )
            states[:, t] = project(backbone, hidden[:, t])
        keywords = lambda k: thinking_keywords(trainer.model, "jacobi", saved, None, k, **shared)  # noqa: E731
        exact = project(backbone, keywords(length)["thinking_hidden_states_cache"])
        short = project(backbone, keywords(1)["thinking_hidden_states_cache"])
    live = saved.thinking_mask & inputs["completion_mask"].bool()
    assert (exact - states)[live].abs().max() <= 1e-5
    assert (short - states)[live].abs().max() > 1e-3


def test_soft_bptt_has_the_value_of_frozen_and_a_gradient_through_the_state(tmp_path):
    """Same loss on-policy (1e-6), another LoRA gradient."""
    grads, values = [], []
    for mode in ("frozen", "soft_bptt"):
        trainer = setups.hrpo(tmp_path, thinking_source="soft_embedding", recompute=mode)
        loud(trainer)
        torch.manual_seed(1)
        inputs = one_batch(trainer)
        trainer.current_gradient_accumulation_steps = 1
        loss = trainer._compute_loss(trainer.model, inputs)
        loss.backward()
        values.append(loss.item())
        grads.append(torch.cat([p.grad.flatten() for n, p in trainer.model.named_parameters() if "lora_B" in n]))
    assert values[0] == pytest.approx(values[1], abs=1e-6)
    assert (grads[0] - grads[1]).abs().max() > 1e-4 * grads[0].abs().max()


def test_frozen_projection_has_no_gradient_and_no_optimizer_state(tmp_path):
    trainer = setups.hrpo(tmp_path, lr_thinking_projection=0.0)
    trainer.train()
    projection = [(n, p) for n, p in trainer.model.named_parameters() if "thinking_projection" in n]
    assert projection and not any(p.requires_grad for _, p in projection)
    assert all(p.grad is None and p not in trainer._torch_optimizer().state for _, p in projection)
    assert {group["role"] for group in trainer.optimizer.param_groups} == {
        "policy",
        "thinking_residual_gate",
        "thinking_residual_Lambda",
    }


def test_groups_have_their_rates_and_the_parents_weight_decay(tmp_path):
    trainer = setups.hrpo(
        tmp_path, weight_decay=0.1, lr_residual_gate=2e-4, lr_residual_lambda=3e-3, lr_thinking_projection=5e-5
    )
    trainer.create_optimizer()
    decayed = trainer.get_decay_parameter_names(trainer.model)
    names = {p: n for n, p in trainer.model.named_parameters()}
    rates = {"gate_": 2e-4, "Lambda": 3e-3, "thinking_projection": 5e-5}
    seen = set()
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            name = names[parameter]
            seen.add(name)
            expected = next((rate for part, rate in rates.items() if part in name and "thinking" in name), 1e-3)
            assert group["lr"] == expected, name
            assert group["weight_decay"] == (0.1 if name in decayed else 0.0), name
    assert seen == {n for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("bound", [0.1, 1e9])
@pytest.mark.parametrize("per_group", [True, False])
def test_gradients_are_bounded_by_group_or_together_and_logged_by_group(tmp_path, per_group, bound):
    trainer = setups.hrpo(tmp_path, max_grad_norm=bound, clip_grad_per_group=per_group)
    trainer.create_optimizer()
    by_role = {}
    for group in trainer.optimizer.param_groups:
        by_role.setdefault(group["role"], []).extend(group["params"])
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    norm = lambda params: torch.stack([p.grad.norm() for p in params]).norm().item()  # noqa: E731
    before = {role: norm(params) for role, params in by_role.items()}
    total = trainer._clip_grad_norm(trainer.model)
    assert len(before) == 4
    assert total.item() == pytest.approx(sum(x**2 for x in before.values()) ** 0.5, rel=1e-5)
    after = {role: norm(params) for role, params in by_role.items()}
    bounded = after.values() if per_group else [norm([p for params in by_role.values() for p in params])]
    if bound > 1:
        assert after == before
    else:
        assert list(bounded) == pytest.approx([bound] * len(bounded), rel=1e-4)
    for role, value in before.items():
        name = "thinking/projection_grad_norm" if role == "thinking_projection" else f"grad_norm/{role}"
        assert trainer._metrics["train"][name] == [pytest.approx(value, rel=1e-4)]


def test_the_reference_does_not_think(tmp_path):
    """beta > 0 with LoRA: the KL reference is the base model, adapter off, without states."""
    trainer = setups.hrpo(tmp_path, beta=0.1)
    loud(trainer)
    inputs = one_batch(trainer)
    ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], 1)
    attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1)
    base = tiny.model("qwen3", std=0.1)
    length = inputs["completion_ids"].shape[1]
    with torch.no_grad():
        logits = base(input_ids=ids, attention_mask=attention).logits[:, -length - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, inputs["completion_ids"][..., None]).squeeze(-1)
    live = inputs["completion_mask"].bool()
    torch.testing.assert_close(inputs["ref_per_token_logps"][live], expected[live], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"])
def test_all_loss_types(tmp_path, loss_type):
    trainer = setups.hrpo(tmp_path, loss_type=loss_type, max_steps=2, num_iterations=2)
    trainer.train()
    assert len(setups.losses(trainer)) == 2
    assert trainer.state.log_history[0]["thinking/ratio_deviation"] <= 1e-5


def test_evaluation_completions_and_the_model_card(tmp_path):
    args = setups.arguments(
        HRPOConfig,
        tmp_path / "out",
        answer_delimiter="#",
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=8,
        log_completions=True,
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
    )
    trainer = HRPOTrainer(
        setups.base_folder(tmp_path),
        setups.reward_digits,
        args,
        train_dataset=setups.prompts(),
        eval_dataset=setups.prompts(8),
        processing_class=tiny.tokenizer(),
        peft_config=setups.lora(),
    )
    trainer.train()
    evals = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evals) == 2 and evals[0]["eval_thinking/fraction"] > 0
    assert list((tmp_path / "out" / "completions").glob("*.parquet"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert "HRPO" in card and "2505.18454" in card


def test_monitors_say_what_they_are_called(tmp_path):
    trainer = setups.hrpo(tmp_path)
    trainer.train()
    first, last = trainer.state.log_history[0], trainer.state.log_history[2]
    for name in (
        "thinking/fraction",
        "thinking/embeds_ratio",
        "thinking/hidden_ratio",
        "thinking/projection_change",
        "thinking/projection_grad_norm",
        "thinking/ratio_deviation",
        "grad_norm/policy",
        "grad_norm/thinking_residual_gate",
        "grad_norm/thinking_residual_Lambda",
        "completions/mean_length",
        "reward",
    ):
        assert name in first, name
    assert 0 < first["thinking/fraction"] < 1
    assert first["thinking/embeds_ratio"] ** 2 + first["thinking/hidden_ratio"] ** 2 == pytest.approx(1, abs=1e-3)
    assert 0 < first["thinking/projection_change"] < last["thinking/projection_change"]


def test_what_is_logged_of_micro_batches_is_of_all_their_thinking_tokens(tmp_path):
    """Rows that think long beside rows that hardly do: eight at once and two at a time log the same, to 1e-5."""
    found = []
    for size in (8, 2):
        trainer = setups.hrpo(
            tmp_path, peft=False, per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_steps=1
        )
        tiny.loud_gates(backbone_of(trainer.model))
        trainer.train()
        logs = trainer.state.log_history[0]
        found.append({k: v for k, v in logs.items() if k.startswith(("thinking/", "completions/", "reward"))})
    assert found[0]["thinking/embeds_ratio"] < 0.99 and found[1] == pytest.approx(found[0], rel=1e-5)


def test_models_in_memory_with_adapters_and_without(tmp_path):
    """Every way to hand over a model ends with thinking modules that train."""
    from peft import get_peft_model

    plain = setups.hrpo(tmp_path, model=tiny.model(std=0.1), peft=False)
    ready = setups.hrpo(tmp_path, model=attach_thinking(tiny.model(std=0.1)), peft=True)
    adapted = setups.hrpo(tmp_path, model=get_peft_model(tiny.model(std=0.1), setups.lora()), peft=False)
    for trainer in (plain, ready, adapted):
        assert has_thinking(trainer.model)
        before = setups.parameters(trainer)
        trainer.train()
        after = setups.parameters(trainer)
        assert any("Lambda" in n and not torch.equal(before[n], after[n]) for n in after)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"use_transformers_continuous_batching": True}, "continuous_batching"),
        ({"answer_delimiter": "§"}, "cannot produce"),
        ({"lr_residual_gate": -1e-4}, "lr_residual_gate=-0.0001: must be at least 0"),
        ({"lr_thinking_projection": math.inf}, "lr_thinking_projection=inf"),
        ({"lr_residual_lambda": "1e-4"}, "lr_residual_lambda='1e-4': must be a finite number"),
        ({"recompute": "jacobi", "jacobi_iterations": 0}, "jacobi_iterations=0: must be at least 1"),
        ({"recompute": "soft_bptt"}, "needs thinking_source='soft_embedding'"),
    ],
)
def test_what_cannot_work_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        setups.hrpo(tmp_path, **changes)


def test_beams_fall_back_to_the_parent(tmp_path):
    trainer = setups.hrpo(tmp_path, generation_kwargs={"num_beams": 2})
    assert not trainer.thinking
    trainer.train()


def test_untrained_copies_are_not_kept(tmp_path):
    trainer = setups.hrpo(tmp_path)
    assert not any("original_module" in name for name, _ in trainer.model.named_parameters())
    merged = trainer.model.merge_and_unload()
    assert has_thinking(merged)


def test_a_missing_vllm_is_an_error_before_anything_is_loaded(tmp_path):
    with pytest.raises(ImportError, match=r"use_vllm=True: vLLM is not installed\. Run: pip install"):
        setups.hrpo(tmp_path, model="no/such-model", use_vllm=True)


def test_a_model_that_thinks_in_vllm_is_refused_with_thinking_off(tmp_path):
    """vLLM's class of such a checkpoint thinks, and the trainer would not."""
    folder = tmp_path / "thinks"
    attach_thinking(tiny.model()).save_pretrained(folder)
    with pytest.raises(ValueError, match=r"thinking=False with use_vllm=True: .*thinks has thinking modules"):
        setups.hrpo(tmp_path, model=str(folder), use_vllm=True, thinking=False)


def test_a_plain_grpo_config_gets_the_defaults(tmp_path):
    args = setups.arguments(trl.GRPOConfig, tmp_path / "out")
    trainer = HRPOTrainer(
        setups.base_folder(tmp_path),
        setups.reward_digits,
        args,
        train_dataset=setups.prompts(),
        processing_class=tiny.tokenizer(),
    )
    assert trainer.hrpo.recompute == "rollout" and trainer.thinking


def test_generate_is_given_back_after_an_error(tmp_path, monkeypatch):
    trainer = setups.hrpo(tmp_path)
    monkeypatch.setattr(type(trainer.model), "generate", functools.partial(lambda *_, **__: 1 / 0))
    with pytest.raises(ZeroDivisionError):
        one_batch(trainer)
    assert "generate" not in vars(trainer.model)


def test_a_frozen_projection_stays_frozen_beside_a_reference_adapter(tmp_path):
    """With a PeftModel and beta > 0 TRL switches to the adapter "ref" and back, which makes all of it trainable again."""
    model, _ = FastThinkingModel.from_pretrained(setups.base_folder(tmp_path), max_seq_length=128)
    model = FastThinkingModel.get_peft_model(model, r=4)
    trainer = setups.hrpo(tmp_path, peft=False, model=model, beta=0.05, lr_thinking_projection=0.0)
    assert "ref" in trainer.model.peft_config
    weight = projection_weight(backbone_of(trainer.model))
    trainer.train()
    assert not weight.requires_grad and weight.grad is None


def test_what_a_rollout_saved_is_cut_or_filled_to_the_length_of_its_completions():
    for saved in (torch.ones(2, 3), torch.ones(2, 3, 4)):
        assert torch.equal(_fit(saved, 2), saved[:, :2]) and _fit(saved, 3) is saved
        filled = _fit(saved, 5)
        assert filled.shape == (2, 5, *saved.shape[2:]) and filled.sum() == saved.sum()
        assert torch.equal(filled[:, :3], saved)
    assert _fit(None, 4) is None
