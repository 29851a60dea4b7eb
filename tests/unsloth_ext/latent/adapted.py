"""Models of each method with an adapter that does something, for tests of engines."""

import torch
from peft import LoraConfig, get_peft_model

from tests import tiny
from unsloth_ext import LatentConfig, attach_latent
from unsloth_ext.latent.config import with_latent_modules


METHODS = {
    "CODI": {"num_latents": 5, "iterations": None, "projection_dim": 16},
    "PCCoT": {"num_latents": 5, "iterations": 3},
    "KaVa": {"num_latents": 5, "iterations": 3, "projection_dim": 16, "kv_projection": True},
}


def adapted(family="qwen2", lora=True, tied=True, wide=False, **settings):
    """A model whose vocabulary had to grow by the latent tokens, and its tokenizer. `wide` is for vLLM's attention on
    CPUs, which has no heads of less than 32."""
    tokenizer = tiny.tokenizer(())
    config = tiny.config(family, vocab_size=len(tokenizer))
    if wide and family == "gpt2":
        config.n_embd = 128
    elif wide:
        config.hidden_size, config.head_dim = 128, 32
    config.tie_word_embeddings = tied
    model = tiny.from_config(config, std=0.12).eval()
    if family == "gemma":  # it multiplies its embeddings by this
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(config.hidden_size**-0.5)
    attach_latent(model, tokenizer, LatentConfig(**(settings or METHODS["KaVa"])))
    if lora:
        adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        vars(adapter).update(with_latent_modules(adapter, model))
        model = get_peft_model(model, adapter).eval()
    change(model)
    return model, tokenizer


def change(model, seed=9):
    """What an optimizer step does."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (0.5 * parameter.std() or 0.1) * torch.randn_like(parameter)
