"""Small modules are float32, and compute so, beside a model in half precision."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from unsloth_ext import attach_concepts, attach_latent, attach_planner, attach_thinking
from unsloth_ext.common.master_weights import MasterLinear, copied_by_peft, master_weights, widen
from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.concept.config import OnlineConceptConfig
from unsloth_ext.hrpo.residual import fuse_thinking
from unsloth_ext.kv_distill.aligner import MapProjectionAligner
from unsloth_ext.latent.config import LatentConfig


ATTACH = {
    "thinking": lambda model: attach_thinking(model),
    "latent": lambda model: attach_latent(model, tiny.tokenizer(()), LatentConfig(projection_dim=16)),
    "concepts": lambda model: attach_concepts(
        model,
        OnlineConceptConfig(n_shallow=1, n_middle=1, n_deep=1, num_concepts=16, segmenter="autoregressive", max_tail=4),
    ),
    "planner": lambda model: attach_planner(model),
}
SMALL = {"thinking": 6, "latent": 6, "concepts": 4, "planner": 2}  # parameters
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("name", ATTACH)
@pytest.mark.parametrize("dtype", HALVES)
def test_what_is_attached_to_a_model_in_half_precision_is_float32(name, dtype):
    config = tiny.config("llama")
    config.num_hidden_layers = 3
    model = ATTACH[name](tiny.from_config(config, dtype=dtype))
    small = master_weights(model)
    assert len(small) == SMALL[name] and {p.dtype for p in small.values()} == {torch.float32}
    assert {p.dtype for n, p in model.named_parameters() if n not in small} == {dtype}


@pytest.mark.parametrize("cast", [lambda m: m.half(), lambda m: m.bfloat16(), lambda m: m.to(torch.bfloat16)])
def test_casting_the_model_leaves_them_to_the_bit(cast):
    model = attach_thinking(tiny.model())
    before = {n: p.detach().clone() for n, p in master_weights(model).items()}
    cast(model)
    assert model.dtype != torch.float32
    for name, parameter in master_weights(model).items():
        assert parameter.dtype == torch.float32 and torch.equal(parameter, before[name]), name
    assert {p.dtype for p in master_weights(model.double()).values()} == {torch.float64}
    assert {p.dtype for p in master_weights(model.half()).values()} == {torch.float32}


def test_a_copy_and_an_aligner_too():
    aligner = MapProjectionAligner(tiny.config("qwen3"), tiny.config("qwen3"))
    for one in (copy.deepcopy(aligner), aligner):
        before = {n: x.clone() for n, x in one.state_dict().items()}
        assert all(x.dtype == before[n].dtype and torch.equal(x, before[n]) for n, x in one.half().state_dict().items())


@pytest.mark.parametrize("dtype", HALVES)
def test_gates_are_computed_in_float32_with_and_without_autocast(dtype):
    """And not in the model's dtype: rounding happens once, at the end."""
    model = attach_thinking(tiny.model(dtype=dtype))
    backbone = backbone_of(model)
    tiny.loud_gates(backbone)
    embeds, hidden = torch.randn(2, 5, 32).to(dtype), torch.randn(2, 5, 32).to(dtype)
    mask = torch.ones(2, 5, dtype=torch.bool)

    def fused():
        return fuse_thinking(backbone, embeds, mask, hidden_states=hidden)

    r, i = ((x.weight, x.bias) for x in (backbone.thinking_residual_gate_r, backbone.thinking_residual_gate_i))
    r, i = (torch.sigmoid(embeds.double() @ w.double().T + b.double()) for w, b in (r, i))
    a = torch.exp(-8 * torch.nn.functional.softplus(-backbone.thinking_residual_Lambda.Lambda.double()) * r)
    states = hidden.double() @ backbone.thinking_projection.weight.double().T
    states = (states / states.norm(dim=-1, keepdim=True)).to(dtype).double()
    right = a * embeds.double() + (1 - a**2).sqrt() * i * states
    assert fused().dtype == dtype
    assert ((fused().double() - right).abs() <= 1.01 * torch.finfo(dtype).eps / 2 * right.abs() + 1e-6).all()
    with torch.autocast("cpu", torch.bfloat16):
        inside = fused()
    assert torch.equal(inside, fused())


def test_gradients_are_float32_and_reach_inputs_in_half_precision():
    linear, x = MasterLinear(4, 3), torch.randn(2, 4, dtype=torch.bfloat16, requires_grad=True)
    linear(x).sum().backward()
    assert linear.weight.grad.dtype == torch.float32 and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("left", ["kept", "copied by PEFT", "nothing"])
def test_what_was_narrowed_behind_their_back_is_widened(left):
    """As TRL does, by `data`: with the values that were kept, those that PEFT copied, or what is left of them."""
    model = attach_thinking(tiny.model(dtype=torch.bfloat16))
    if left == "copied by PEFT":
        config = LoraConfig(target_modules=["q_proj"], modules_to_save=["thinking_residual_Lambda"])
        model = get_peft_model(model, config)
    small = {n: p for n, p in master_weights(model).items() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in small.items()}
    assert small and widen(model) == []
    values = {"kept": {p: before[n] for n, p in small.items()}, "copied by PEFT": copied_by_peft(model), "nothing": {}}
    for parameter in small.values():
        parameter.data = parameter.data.bfloat16()
    assert widen(model, values[left]) == list(small)
    for name, parameter in small.items():
        exact = before[name] if left != "nothing" else before[name].bfloat16().float()
        assert parameter.dtype == torch.float32 and torch.equal(parameter, exact), name
