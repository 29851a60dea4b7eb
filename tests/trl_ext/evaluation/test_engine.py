"""Evaluation with vLLM: equal texts and costs where it serves, refused by name where it does not."""

import pytest
import torch

from tests import tiny
from tests.kinds import saved
from tests.unsloth_ext.latent.adapted import adapted
from trl_ext.evaluation import command
from trl_ext.evaluation.engine import Engine
from unsloth_ext import FastThinkingModel, ThinkingConfig
from unsloth_ext.common.text_model import TextModel
from unsloth_ext.common.wrapping import backbone_of


SETTINGS = {"dtype": "float32", "enforce_eager": True, "kv_cache_memory_bytes": 1 << 24, "max_model_len": 64}
PROMPTS = ["1+2=", "13+4+5=", "7-2=", "44+1="]


def wide():
    """vLLM's attention on CPUs has no heads of less than 32."""
    config = tiny.config("qwen2")
    config.hidden_size, config.head_dim = 128, 32
    return tiny.from_config(config, std=0.12).eval()


def made(kind, folder):
    if kind == "latent":
        model, tokenizer = adapted(wide=True, lora=False)
    elif kind == "hrpo":
        wide().save_pretrained(folder / "base")
        tokenizer = tiny.tokenizer()
        tokenizer.save_pretrained(folder / "base")
        model, _ = FastThinkingModel.from_pretrained(str(folder / "base"), thinking=ThinkingConfig())
        model = FastThinkingModel.get_peft_model(model, r=2, random_state=0)  # merged for the engine
        tiny.loud_gates(backbone_of(model))
    else:
        model, tokenizer = wide(), tiny.tokenizer()
    model.save_pretrained(folder / "saved")
    tokenizer.save_pretrained(folder / "saved")
    return str(folder / "saved")


@pytest.mark.vllm
@pytest.mark.parametrize("kind", ["hrpo", "latent", "plain"])
def test_texts_and_costs_are_those_of_transformers(kind, tmp_path):
    from tests import vllm_on_cpu  # noqa: F401

    folder = made(kind, tmp_path)
    opened = TextModel.from_pretrained(folder, delimiter="##")
    batch = opened.tokenize(PROMPTS)
    how = {"max_new_tokens": 8, "do_sample": False}
    if kind == "hrpo":
        how |= {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    with Engine(opened, folder, **SETTINGS) as engine:
        for state in engine.states if kind == "latent" else ("on",):
            if state in ("noise", "shuffle", "interpolate"):
                continue
            wanted = opened.complete(batch["input_ids"], batch["attention_mask"], state=state, **how)
            found = engine.complete(batch["input_ids"], batch["attention_mask"], state=state, **how)
            assert opened.decode(found) == opened.decode(wanted)
            for name in ("lengths", "forwards", "latent"):
                assert torch.equal(getattr(found, name), getattr(wanted, name)), name


@pytest.mark.parametrize("kind", ["concept", "planner"])
def test_what_vllm_does_not_serve_is_refused_by_name(kind, tmp_path, monkeypatch):
    monkeypatch.setattr("trl_ext.evaluation.engine.require_vllm", lambda asked: None)
    folder = str(saved(kind, True, tmp_path))
    with pytest.raises(ValueError, match=rf"--engine vllm: vLLM .*leave it out \({kind} models\)"):
        command.main([folder, "--engine", "vllm", "--held_out", "2", "--output", str(tmp_path)])


def test_without_vllm_one_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr("unsloth_ext.common.vllm_installed.installed_version", lambda _: None)
    folder = str(saved("plain", False, tmp_path))
    with pytest.raises(ImportError, match="--engine vllm: vLLM is not installed"):
        command.main([folder, "--engine", "vllm", "--held_out", "2", "--output", str(tmp_path)])
