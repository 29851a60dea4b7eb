"""Reading a model's weights for vLLM: the values of TRL, and base weights that stay what they are."""

import contextlib
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.generation.vllm_generation import VLLMGeneration

import patches
from patches.vllm_pushed_weights import pushed_weights
from tests import tiny


LAYERS = ["q_proj", "v_proj", "down_proj"]
ADAPTERS = {
    "LoRA": {"target_modules": LAYERS},
    "biases": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "DoRA": {"target_modules": LAYERS, "use_dora": True},
    "a copy of a module": {"target_modules": LAYERS, "modules_to_save": ["norm"]},
    "embeddings": {"target_modules": [*LAYERS, "embed_tokens"]},
    "tied embeddings": {"target_modules": [*LAYERS, "embed_tokens"], "ensure_weight_tying": True},
}


def adapted(name, dtype):
    model = tiny.from_config(tiny.config("qwen2"), std=0.1)
    model.config.tie_word_embeddings = name == "tied embeddings"
    if name == "tied embeddings":
        model.tie_weights()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model = get_peft_model(model, LoraConfig(r=4, **ADAPTERS[name]))
    torch.manual_seed(1)
    for parameter_name, parameter in model.named_parameters():
        if model.prefix in parameter_name:
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model


def reading(model):
    """TRL's iterator over what it pushes."""
    generation = VLLMGeneration.__new__(VLLMGeneration)
    generation.model = model
    generation._dist = types.SimpleNamespace(is_fsdp=False, gather_params=lambda _: contextlib.nullcontext())
    generation._fix_param_name_to_vllm = lambda name, extra_prefixes=(): name
    return generation._iter_named_params()


def pushed(model):
    """What TRL pushes, by name. Values are copied as they come, as vLLM does."""
    return {name: value.clone() for name, value in reading(model)}


def state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def changes(model, before):
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("name", ADAPTERS)
def test_values_are_trls_and_the_base_stays(name):
    model = adapted(name, torch.bfloat16)
    before = state(model)
    with patches.applied("vllm_pushed_weights"):
        ours = pushed(model)
        again = pushed(model)
    assert not changes(model, before)
    stock = pushed(model)  # which rounds the base
    assert changes(model, before)
    assert list(ours) == list(stock) == list(again)
    for key, value in stock.items():
        assert torch.equal(ours[key], value) and torch.equal(again[key], value), key


def test_a_push_that_fails_leaves_the_model_as_it_was():
    model = adapted("LoRA", torch.bfloat16)
    before = state(model)
    with patches.applied("vllm_pushed_weights"):
        values = reading(model)
        next(value for name, value in values if "q_proj" in name)
        values.close()
    assert not changes(model, before)
    assert not any(getattr(module, "merged", False) for module in model.modules())
    assert "merge_adapter" not in vars(model) and "unmerge_adapter" not in vars(model)


def test_a_model_without_an_adapter_is_read_as_it_is():
    model = tiny.from_config(tiny.config("qwen2"), std=0.1)
    with patches.applied("vllm_pushed_weights"):
        assert list(pushed(model)) == [name for name, _ in model.named_parameters()]


def test_a_name_that_fsdp2_sends_twice_is_sent_once(monkeypatch):
    model = tiny.from_config(tiny.config("qwen2"), std=0.1)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    monkeypatch.setattr(VLLMGeneration, "_iter_named_params", lambda self: iter(self.model.state_dict().items()))
    assert "lm_head.weight" in pushed(model)
    with patches.applied("vllm_pushed_weights"):
        assert list(pushed(model)) == [name for name, _ in model.named_parameters()]


def test_the_weights_are_gathered_while_they_are_read():
    model, events = adapted("LoRA", torch.float32), []

    @contextlib.contextmanager
    def gather(given):
        assert given is model
        events.append("gathered")
        yield
        events.append("split")

    with pushed_weights(gather):
        for _ in reading(model):
            assert events == ["gathered"]
    assert events == ["gathered", "split"]
