"""Logits at some positions against those at all, with the gradients they give."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Gemma2Config, GraniteConfig

from tests import tiny
from unsloth_ext.common.logits import logits_at, logits_of


INPUTS = {"input_ids": torch.randint(3, 60, (3, 7), generator=torch.Generator().manual_seed(0))}
KEEP = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.4


class Wrapped(nn.Module):
    """As DDP does."""

    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, **inputs):
        return self.module(**inputs)


def scaled(cls, **changes):
    small = {
        k: v
        for k, v in tiny.config("llama").to_dict().items()
        if k
        in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        )
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(cls(**small, **changes)).eval()


MODELS = {
    "qwen3": lambda: tiny.model("qwen3"),
    "gpt2": lambda: tiny.model("gpt2"),
    "lora": lambda: get_peft_model(tiny.model(), LoraConfig(target_modules="all-linear", init_lora_weights=False)),
    "wrapped": lambda: Wrapped(tiny.model()),
    "soft-capped": lambda: scaled(Gemma2Config, final_logit_softcapping=0.01),
    "scaled": lambda: scaled(GraniteConfig, logits_scaling=7.0),
}


@pytest.mark.parametrize("name", MODELS)
def test_they_are_the_rows_of_all_logits_and_so_are_gradients(name):
    """1e-6 of the largest: a matrix product of other shape. The head sees no other position; its hook is gone after."""
    model = MODELS[name]()
    bare = getattr(model, "module", model)
    found = logits_at(model, KEEP, **INPUTS).logits
    wanted = model(**INPUTS).logits[KEEP]
    assert found.shape == (KEEP.sum(), 64) and (found - wanted).abs().max() <= 1e-6 * wanted.abs().max()
    parameters = [p for p in model.parameters() if p.requires_grad]
    ours, theirs = (torch.autograd.grad(x.square().sum(), parameters) for x in (found, wanted))
    scale = max(g.abs().max() for g in theirs)
    assert scale > 0 and all((a - b).abs().max() <= 1e-6 * scale for a, b in zip(ours, theirs, strict=True))
    seen = []
    handle = bare.get_output_embeddings().register_forward_hook(lambda _, __, out: seen.append(out.shape))
    logits_at(model, KEEP, **INPUTS)
    handle.remove()
    assert seen == [(1, KEEP.sum(), 64)]
    assert model(**INPUTS).logits.shape == (3, 7, 64)


def test_no_position_is_a_zero_that_has_gradients():
    model = tiny.model()
    found = logits_at(model, torch.zeros_like(KEEP), **INPUTS).logits
    assert found.shape == (0, 64)
    found.sum().backward()
    assert all(not p.grad.any() for p in model.parameters())


def test_the_hook_goes_when_the_forward_fails_and_a_model_without_a_head_is_named():
    model = tiny.model()
    with pytest.raises(ValueError, match="exactly one of"):
        logits_at(model, KEEP)
    assert not model.get_output_embeddings()._forward_pre_hooks
    with pytest.raises(ValueError, match="Qwen3Model has no output embedding"):
        logits_at(model.model, KEEP, **INPUTS)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_logits_of_hidden_states_are_the_models_own(family):
    net = tiny.model(family)
    ids = torch.randint(3, 40, (2, 6))
    hidden = net.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(logits_of(net, hidden), net(input_ids=ids).logits, rtol=0, atol=0)


@pytest.mark.parametrize("family, fields", [("Granite", {"logits_scaling": 3.0}), ("Cohere", {"logit_scale": 0.3})])
def test_scaling_of_logits_is_applied(family, fields):
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        **fields,
    )
    net = tiny.from_config(config).eval()
    ids = torch.randint(3, 40, (2, 6))
    hidden = net.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(logits_of(net, hidden), net(input_ids=ids).logits, rtol=0, atol=0)


def test_soft_capping_is_applied():
    from transformers import AutoModelForCausalLM, Gemma2Config

    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(
        Gemma2Config(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            final_logit_softcapping=0.01,
        )
    ).eval()
    ids = torch.randint(3, 40, (2, 6))
    hidden = net.base_model(input_ids=ids).last_hidden_state
    torch.testing.assert_close(logits_of(net, hidden), net(input_ids=ids).logits, rtol=0, atol=0)
