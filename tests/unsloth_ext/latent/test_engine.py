"""What reaches a vLLM engine and what is refused before one starts, without vLLM. test_engine_vllm.py has the engine."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from tests import tiny
from unsloth_ext import (
    CompressedCache,
    ConceptModel,
    LatentConfig,
    LatentEngine,
    LatentModel,
    OnlineConceptConfig,
    PlannerConfig,
    PlannerExecutorModel,
    attach_concepts,
    attach_latent,
    attach_planner,
    backbone_of,
    latent_generate,
)
from unsloth_ext.common.checksum import checksum
from unsloth_ext.latent.engine import check_served, save_merged

from .adapted import METHODS, adapted
from .test_phase import questions


GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


class Reading:
    """An engine that is transformers, on the embeddings that vLLM would get."""

    def decode(self, model, embeds, attention_mask, settings):
        how = {name: getattr(settings, name) for name in GREEDY}
        return model.generate(inputs_embeds=embeds, attention_mask=attention_mask, **how)


@pytest.fixture
def no_vllm(monkeypatch):
    monkeypatch.setattr("unsloth_ext.common.vllm_installed.installed_version", lambda _: None)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
@pytest.mark.parametrize("method", METHODS)
def test_an_engine_gets_all_that_the_answer_depends_on(family, method):
    """Equal tokens and state from the embeddings of question, latent tokens and <eot> alone."""
    model, _ = adapted(family, **METHODS[method])
    ids, mask = questions()
    wanted, state = latent_generate(model, ids, mask, return_state=True, **GREEDY)
    found, same = latent_generate(model, ids, mask, return_state=True, engine=Reading(), **GREEDY)
    assert torch.equal(found, wanted) and torch.equal(same.latents, state.latents)
    zero = latent_generate(model, ids, mask, intervene=torch.zeros_like, engine=Reading(), **GREEDY)
    assert torch.equal(zero, latent_generate(model, ids, mask, intervene=torch.zeros_like, **GREEDY))


@pytest.mark.parametrize("lora", [True, False])
def test_what_is_written_for_vllm_is_the_same_model_without_its_modules(tmp_path, lora):
    """Logits to 1e-5 (fp32, LoRA is merged); the model itself keeps every bit."""
    model, _ = adapted(lora=lora)
    before = checksum(model)
    save_merged(model, tmp_path)
    assert checksum(model) == before and hasattr(backbone_of(model), "latent_projection")
    written, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert written.generation_config.eos_token_id is None and model.generation_config.eos_token_id == 1
    ids = torch.tensor([[5, 6, 7, *backbone_of(model).latent_token_ids]])
    with torch.no_grad():
        assert (written(ids).logits - model(ids).logits).abs().max() <= 1e-5


def test_without_vllm_one_sentence_says_how_to_get_it(no_vllm):
    model, tokenizer = adapted()
    wanted = r"engine='vllm': vLLM is not installed\. Run: pip install 'vllm==0\.31\.\*'"
    with pytest.raises(ImportError, match=wanted):
        LatentEngine(model)
    with pytest.raises(ImportError, match=wanted):
        LatentModel(model, tokenizer).generate("1+2=", engine="vllm", max_new_tokens=2)
    with pytest.raises(ValueError, match="engine='sglang': choose 'vllm'"):
        LatentModel(model, tokenizer).generate("1+2=", engine="sglang", max_new_tokens=2)


def test_weights_that_vllm_cannot_get_are_named(monkeypatch):
    monkeypatch.setattr("unsloth_ext.latent.engine.require_vllm", lambda _: None)
    model, _ = adapted(lora=False)
    model.is_quantized = True
    with pytest.raises(ValueError, match="the model is quantised"):
        LatentEngine(model)
    model.is_quantized = False
    model.lm_head.weight = torch.nn.Parameter(torch.empty(0))
    with pytest.raises(ValueError, match=r"embed_tokens\.weight|lm_head\.weight"):
        LatentEngine(model)


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 1.1},
        {"no_repeat_ngram_size": 2},
        {"bad_words_ids": [[5]]},
        {"stop_strings": ["4"]},
        {"typical_p": 0.9},
        {"max_time": 1.0},
        {"output_logits": True},
        {"return_dict_in_generate": True},
        {"max_new_tokens": None},
        {"logits_processor": [print]},
        {"streamer": print},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_an_argument_that_vllm_cannot_do_is_refused_by_name(asked):
    model, _ = adapted()
    with pytest.raises(ValueError, match=f"^{next(iter(asked))}.*vLLM"):
        latent_generate(model, *questions(), engine=Reading(), **{**GREEDY, **asked})


def test_arguments_that_change_nothing_are_not_refused():
    neutral = {"repetition_penalty": 1.0, "typical_p": 1.0, "no_repeat_ngram_size": 0, "length_penalty": 1.0}
    check_served(GenerationConfig(max_new_tokens=2, **neutral), {"generation_config": None, "tokenizer": "any"})


def test_what_vllm_does_not_serve_says_why():
    base, tokenizer = tiny.model(), tiny.tokenizer(())
    config = tiny.config("llama")
    config.num_hidden_layers = 3
    net = attach_concepts(tiny.from_config(config), OnlineConceptConfig(n_shallow=1, n_middle=1, n_deep=1))
    concept = ConceptModel(net, tokenizer)
    planner = PlannerExecutorModel(attach_planner(tiny.model(), PlannerConfig()), tokenizer)
    for model, why in ((concept, "same tokens in every layer"), (planner, "positions up from 0")):
        with pytest.raises(ValueError, match=rf"engine='vllm': .*{why}"):
            model.generate("1+2=", engine="vllm", max_new_tokens=2)
    model = attach_latent(base, tokenizer, LatentConfig(2, 1))
    with pytest.raises(ValueError, match="past_key_values"):
        latent_generate(
            model, *questions(), engine=Reading(), past_key_values=CompressedCache(model, budget=16), **GREEDY
        )
