"""A trainer with nothing to train says so at construction, whatever else would learn beside it."""

import pytest
import torch
from bitsandbytes.functional import _convert_weight_packed_for_cpu
from bitsandbytes.nn import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import BitsAndBytesConfig, LlamaConfig

from tests import tiny
from tests.trl_ext.common import test_resume
from tests.trl_ext.common.test_checkpointing import sft
from tests.trl_ext.hrpo import setups as hrpo
from trl_ext.common.trainable_parameters import check_trainable
from unsloth_ext.common.evaluation_mode import evaluating


FROZEN = r"adapter 'default' is frozen.*is_trainable=True"


@pytest.mark.parametrize("name", test_resume.RL)
def test_reinforcement(tmp_path, name):
    """Also with a reference, whose adapter is added before."""
    model = test_resume.wrapped(test_resume.AutoModelForCausalLM.from_pretrained(hrpo.base_folder(tmp_path)))
    model.save_pretrained(tmp_path / "adapter")
    make = {
        "hrpo": test_resume.make_hrpo,
        "spo": test_resume.make_spo,
        "ppo": test_resume.make_ppo,
        "grpo": test_resume.make_grpo,
    }[name]
    for beta in (0.0, 0.05):
        base = test_resume.AutoModelForCausalLM.from_pretrained(hrpo.base_folder(tmp_path))
        given = PeftModel.from_pretrained(base, tmp_path / "adapter")
        with pytest.raises(ValueError, match=FROZEN):
            make(tmp_path, given, None, beta=beta)
    base = test_resume.AutoModelForCausalLM.from_pretrained(hrpo.base_folder(tmp_path)).requires_grad_(False)
    if name != "hrpo":  # which trains its thinking modules
        with pytest.raises(ValueError, match="every parameter of the model is frozen"):
            make(tmp_path, base, None, beta=0.0)


@pytest.mark.parametrize("name", test_resume.supervised_cases())
def test_supervised(tmp_path, name):
    make, changes = test_resume.SUPERVISED[name]
    first = make(tmp_path, peft=True, **changes)
    for parameter in first.model.parameters():
        parameter.requires_grad_(False)
    first.model.peft_config["default"].inference_mode = True  # as PeftModel.from_pretrained leaves it
    more = {"tokenizer": first.processing_class} if name == "reasoning" else {}
    with pytest.raises(ValueError, match=FROZEN):
        make(tmp_path, model=first.model, peft=False, **more, **changes)


def test_other_ways_to_be_frozen(tmp_path):
    base = tiny.model()
    base.save_pretrained(tmp_path / "base")
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    base.name_or_path = str(tmp_path / "base")
    get_peft_model(base, lora).save_pretrained(tmp_path / "adapter")
    injected = test_resume.AutoModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=FROZEN):  # what an adapter's folder given as the model becomes
        sft(tmp_path, injected)
    loaded = PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter", is_trainable=True)
    check_trainable(loaded)
    loaded.load_adapter(tmp_path / "adapter", "other")  # frozen, beside the one that learns
    check_trainable(loaded)
    by_hand = PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter")
    for name, parameter in by_hand.named_parameters():
        parameter.requires_grad_("lora" in name)
    check_trainable(by_hand)
    merged = PeftModel.from_pretrained(tiny.model(), tmp_path / "adapter").merge_and_unload().requires_grad_(True)
    check_trainable(merged)
    part = tiny.model().requires_grad_(False)
    part.lm_head.requires_grad_(True)
    check_trainable(part)
    part.requires_grad_(False)
    with pytest.raises(ValueError, match="every parameter of the model is frozen"):
        sft(tmp_path, part)


@pytest.mark.parametrize("make", [test_resume.make_hrpo, test_resume.make_ppo])
def test_an_adapter_that_is_merged_or_switched_off(tmp_path, make):
    """HRPO would train its thinking modules, PPO its critic, and the adapter would stay."""
    model = test_resume.wrapped(tiny.model())
    ways = (
        (model.merge_adapter, model.unmerge_adapter, r"is merged .*: call model\.unmerge_adapter\(\)"),
        (model.disable_adapter_layers, model.enable_adapter_layers, r"is disabled.*\.enable_adapter_layers"),
    )
    for off, on, said in ways:
        off()
        with pytest.raises(ValueError, match=rf"^the model's adapter {said}"):
            make(tmp_path, model, None, beta=0.0)
        on()
    make(tmp_path, model, None, beta=0.0)


def four_bits(tmp_path):
    """Wide enough for bitsandbytes to pack; as on a CPU with AVX512-BF16, whatever this one has."""
    folder = tmp_path / "base"
    if not folder.exists():
        wide = LlamaConfig(
            vocab_size=64,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            bos_token_id=1,
            eos_token_id=1,
        )
        tiny.from_config(wide).save_pretrained(folder)
        tiny.tokenizer().save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    model = test_resume.AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True
    return model


def test_evaluation_leaves_gradients_to_4_bit_weights(tmp_path):
    """Bit for bit those of a model that was never evaluated."""
    gradients = []
    for look in (False, True):
        model = four_bits(tmp_path)
        if look:
            with evaluating(model), torch.no_grad():
                model(input_ids=torch.arange(1, 9)[None])
        check_trainable(model)
        with torch.no_grad():
            model.eval()(input_ids=torch.arange(1, 9)[None])
        model.train()(input_ids=torch.arange(1, 9)[None]).logits.pow(2).sum().backward()
        gradients.append(model.get_input_embeddings().weight.grad)
    assert gradients[0].abs().max() > 0 and torch.equal(*gradients)


def test_packed_weights_are_refused(tmp_path):
    model = four_bits(tmp_path)
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.data, layer.weight.quant_state = _convert_weight_packed_for_cpu(
        layer.weight.data, layer.weight.quant_state
    )
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.up_proj: its 4-bit weights were packed .* load the model again"
    ):
        sft(tmp_path, get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])))
