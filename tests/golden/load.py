"""Golden files and the tiny models they were made with."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel


GOLDEN = Path(__file__).parent


def load(name: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and configuration of a file."""
    file = GOLDEN / f"{name}.safetensors"
    with safe_open(file, "pt") as tensors:
        return load_file(file), json.loads((tensors.metadata() or {}).get("config", "{}"))


def model_of(case: dict[str, torch.Tensor], kind: str, prefix: str = "w.") -> PreTrainedModel:
    """The official model's weights in a stock one, with eager attention: fully masked rows differ under SDPA."""
    weights = {k.removeprefix(prefix): v for k, v in case.items() if k.startswith(prefix)}
    if kind == "gpt2":
        vocab = len(weights["transformer.wte.weight"])
        config = GPT2Config(
            vocab_size=vocab,
            n_positions=128,
            n_embd=32,
            n_layer=3,
            n_head=4,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            bos_token_id=None,
            eos_token_id=None,
        )
        model = GPT2LMHeadModel(config)
    else:
        vocab = len(weights["model.embed_tokens.weight"])
        config = LlamaConfig(
            vocab_size=vocab,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
        )
        model = LlamaForCausalLM(config)
    found = model.load_state_dict(weights, strict=False)
    assert not found.unexpected_keys and set(found.missing_keys) <= {"lm_head.weight"}, found  # tied
    model.tie_weights()
    model.set_attn_implementation("eager")
    return model.eval()
