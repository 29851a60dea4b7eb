"""Load, wrap, save, restore in a fresh process, merge, drop: on the stock backend (Unsloth's is in test_unsloth_*)."""

import importlib.util
import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests import tiny
from tests.processes import fresh
from unsloth_ext import (
    FastThinkingModel,
    ThinkingConfig,
    attach_thinking,
    backbone_of,
    has_thinking,
    train_tokenizer,
)
from unsloth_ext.common.backend import unsloth_can_run
from unsloth_ext.hrpo import fast_model
from unsloth_ext.hrpo.adapter import THINKING_MODULES


def base(tmp_path, family="qwen3"):
    folder = tmp_path / "base"
    if not folder.exists():
        tiny.model(family).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    return str(folder)


def load(name, **options):
    return FastThinkingModel.from_pretrained(name, max_seq_length=64, use_unsloth=False, **options)


def trained(model):
    """Move every trainable parameter, so that a restored initial value would show."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def thinking_logits(model):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 40, (2, 8), generator=generator)
    hidden = torch.randn(2, 4, 32, generator=generator)
    with torch.no_grad():
        return model(
            input_ids=ids,
            thinking_mask=torch.ones(2, 4, dtype=torch.bool),
            recompute_thinking_projection=True,
            thinking_hidden_states_cache=hidden,
        ).logits


def in_a_fresh_process(folder):
    """The same logits from a process that knows only the folder."""
    code = (
        "import sys, torch; from tests.unsloth_ext.hrpo.test_fast_model import load, thinking_logits;"
        "model, _ = load(sys.argv[1]); torch.save(thinking_logits(model.eval()), sys.argv[2])"
    )
    out = f"{folder}/logits.pt"
    fresh("-c", code, folder, out).check_returncode()
    return torch.load(out, weights_only=True)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_an_adapter_comes_back_whole_in_a_fresh_process(tmp_path, family):
    config = ThinkingConfig("soft_embedding", "embedding_rms", 0.9, 0.95)
    model, tokenizer = load(base(tmp_path, family), thinking=config)
    targets = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    model = trained(FastThinkingModel.get_peft_model(model, r=4, target_modules=targets)).eval()
    model.save_pretrained(tmp_path / "adapter")
    tokenizer.save_pretrained(tmp_path / "adapter")
    assert {f.suffix for f in (tmp_path / "adapter").iterdir()} <= {".json", ".safetensors", ".md"}
    names = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for module in THINKING_MODULES:
        assert any(module in name for name in names), module
    assert torch.equal(in_a_fresh_process(tmp_path / "adapter"), thinking_logits(model))
    again, _ = load(str(tmp_path / "adapter"))
    assert backbone_of(again).thinking_config == config
    assert any(p.requires_grad for n, p in again.named_parameters() if "lora" in n)


@pytest.mark.parametrize("own", [True, False])
def test_an_adapter_has_the_tokenizer_that_was_saved_with_it(tmp_path, own):
    model, tokenizer = load(base(tmp_path))
    trained(FastThinkingModel.get_peft_model(model, r=4)).save_pretrained(tmp_path / "adapter")
    tokenizer.chat_template = "{{ messages[0].content }}"
    if own:
        tokenizer.save_pretrained(tmp_path / "adapter")
    _, again = load(str(tmp_path / "adapter"))
    assert again.chat_template == (tokenizer.chat_template if own else None) and again.padding_side == "left"
    if own:
        larger = train_tokenizer(["1+2="], 300)
        larger.save_pretrained(tmp_path / "larger")
        shutil.copy(tmp_path / "larger" / "tokenizer.json", tmp_path / "adapter")
        with pytest.raises(
            ValueError, match=r"its tokenizer has \d+ tokens, and the model has embeddings for \d+: they"
        ):
            load(str(tmp_path / "adapter"))


def test_a_full_model_comes_back_whole_in_a_fresh_process(tmp_path):
    model, tokenizer = load(base(tmp_path), thinking=ThinkingConfig("projection", "none", 0.8, 0.9))
    trained(model).eval().save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    assert torch.equal(in_a_fresh_process(tmp_path / "full"), thinking_logits(model))
    assert json.loads((tmp_path / "full" / "config.json").read_text())["thinking"]["thinking_norm"] == "none"


def test_merging_keeps_or_drops_the_thinking_modules(tmp_path):
    model, tokenizer = load(base(tmp_path))
    model = trained(FastThinkingModel.get_peft_model(model, r=4)).eval()
    expected = thinking_logits(model)
    model.save_pretrained(tmp_path / "adapter")
    merged = FastThinkingModel.merge(model)
    assert not isinstance(merged, PeftModel) and has_thinking(merged)
    torch.testing.assert_close(thinking_logits(merged), expected, rtol=1e-4, atol=1e-4)  # sums in another order
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(in_a_fresh_process(tmp_path / "merged"), expected, rtol=1e-4, atol=1e-4)

    again, _ = load(str(tmp_path / "adapter"))
    plain = FastThinkingModel.merge(again, keep_thinking=False)
    assert not has_thinking(plain)
    plain.save_pretrained(tmp_path / "plain")
    AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not any("thinking" in name for name in load_file(tmp_path / "plain" / "model.safetensors"))


def test_the_adapter_switched_off_is_the_base(tmp_path):
    model, _ = load(base(tmp_path))
    model = trained(FastThinkingModel.get_peft_model(model, r=4)).eval()
    ids = torch.randint(3, 40, (2, 6))
    with torch.no_grad(), model.disable_adapter():
        off = model(input_ids=ids).logits
    assert torch.equal(off, tiny.model()(input_ids=ids).logits)


def test_all_linear_leaves_the_thinking_modules_alone(tmp_path):
    model = FastThinkingModel.get_peft_model(load(base(tmp_path))[0], r=4, target_modules="all-linear")
    lora = {name for name, _ in model.named_modules() if "lora_A" in name}
    assert lora and not any("thinking" in name for name in lora)


def test_an_adapter_without_gates_needs_a_word(tmp_path):
    from peft import LoraConfig, get_peft_model

    plain = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base(tmp_path)), LoraConfig(r=4, target_modules=["q_proj"])
    )
    plain.save_pretrained(tmp_path / "plain")
    tiny.tokenizer().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"has no thinking modules.*thinking=ThinkingConfig"):
        load(str(tmp_path / "plain"))
    model, _ = load(str(tmp_path / "plain"), thinking=ThinkingConfig())
    assert has_thinking(model)
    model.save_pretrained(tmp_path / "with")
    assert any("thinking" in name for name in load_file(tmp_path / "with" / "adapter_model.safetensors"))
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("thinking_projection" in name for name in trainable)


def test_a_model_that_lost_its_thinking_tensors_says_so(tmp_path):
    model, tokenizer = load(base(tmp_path))
    model.save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    AutoModelForCausalLM.from_pretrained(base(tmp_path)).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").replace(tmp_path / "full" / "model.safetensors")
    with pytest.raises(ValueError, match=r"has settings for modules, but lacks .*thinking_residual_gate_r"):
        load(str(tmp_path / "full"))


def test_too_long_for_the_model(tmp_path):
    with pytest.raises(ValueError, match="max_seq_length=9999"):
        FastThinkingModel.from_pretrained(base(tmp_path), max_seq_length=9999, use_unsloth=False)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_four_bits_where_bitsandbytes_can(tmp_path, family):
    """NF4 on this device: loads, thinks, and its gradients reach the gates. The values are only near the fp32 ones."""
    pytest.importorskip("bitsandbytes")
    from transformers import AutoConfig

    torch.manual_seed(0)
    config = tiny.config(family)
    config.hidden_size, config.head_dim, config.intermediate_size = 64, 16, 128  # bitsandbytes wants blocks of 64
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    assert AutoConfig.from_pretrained(tmp_path / "base").hidden_size == 64
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    model, _ = load(str(tmp_path / "base"), load_in_4bit=True)
    assert model.is_loaded_in_4bit
    model = FastThinkingModel.get_peft_model(model, r=4)
    states, mask = torch.randn(2, 4, 64), torch.ones(2, 4, dtype=torch.bool)
    ids = torch.randint(3, 40, (2, 8))
    model(input_ids=ids, thinking_mask=mask, thinking_embeds=states).logits.float().pow(2).mean().backward()
    gates = [p.grad for n, p in model.named_parameters() if "Lambda" in n and p.requires_grad]
    assert gates and all(g.abs().max() > 0 for g in gates)


def test_attach_thinking_to_a_peft_model_joins_its_adapter(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny.model(), LoraConfig(r=4, target_modules=["q_proj"]))
    attach_thinking(model)
    model.save_pretrained(tmp_path / "adapter")
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {m for m in THINKING_MODULES if any(m in name for name in saved)} == set(THINKING_MODULES)


@pytest.mark.parametrize("can", [True, False])
def test_without_a_word_the_backend_is_the_one_that_can_run(tmp_path, monkeypatch, can):
    asked, stock = [], fast_model._load_transformers
    monkeypatch.setattr(fast_model, "unsloth_can_run", lambda: (can, ""))
    for name in ("unsloth", "transformers"):
        monkeypatch.setattr(
            fast_model, f"_load_{name}", lambda *a, name=name, **k: asked.append(name) or stock(*a, **k)
        )
    for use_unsloth in (None, True, False):
        FastThinkingModel.from_pretrained(base(tmp_path), max_seq_length=64, use_unsloth=use_unsloth)
    assert asked == ["unsloth" if can else "transformers", "unsloth", "transformers"]


@pytest.mark.parametrize(
    "installed, allowed, cuda, can",
    [
        (False, "1", True, False),
        (True, "1", False, True),
        (True, "0", True, True),
        (True, "0", False, False),
    ],
)
def test_unsloth_can_run_where_it_is_installed_and_sees_a_gpu_or_is_told_to(monkeypatch, installed, allowed, cuda, can):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setenv("UNSLOTH_ALLOW_CPU", allowed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert unsloth_can_run()[0] is can


def test_an_adapter_gets_no_second_one(tmp_path):
    net = FastThinkingModel.get_peft_model(tiny.model())
    with pytest.raises(ValueError, match=r"the model already has an adapter.*do not call get_peft_model, or merge"):
        FastThinkingModel.get_peft_model(net)
