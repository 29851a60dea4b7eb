"""Tiny random models and tokenizers, made in code: what every test runs on."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)


FAMILIES = ("llama", "qwen2", "qwen3", "mistral", "gemma", "gpt2")
CHARS = "0123456789+-*=#;. abcdefghijklmnopqrstuvwxyz"


def tokenizer(merges: tuple[str, ...] = ("##", "1#")) -> PreTrainedTokenizerFast:
    """Characters and a few multi-character tokens, so that a delimiter can be split or lie inside a token."""
    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2}
    for piece in [*CHARS, *merges]:
        vocab.setdefault(piece, len(vocab))
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def config(family: str, vocab_size: int = 64):
    """Two layers, grouped-query attention where the family has it."""
    if family == "gpt2":
        return GPT2Config(
            vocab_size=vocab_size, n_embd=32, n_layer=2, n_head=4, n_positions=128, bos_token_id=1, eos_token_id=1
        )
    cls = {
        "llama": LlamaConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "mistral": MistralConfig,
        "gemma": GemmaConfig,
    }[family]
    return cls(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        tie_word_embeddings=True,
    )


def model(family: str = "qwen3", seed: int = 0, dtype: torch.dtype = torch.float32, std: float = 0.3):
    """A random causal LM whose weights are large enough for its outputs to depend on its inputs."""
    return from_config(config(family), seed, std, dtype).eval()


def from_config(config, seed: int = 0, std: float = 0.3, dtype: torch.dtype = torch.float32):
    """One of any configuration, in training mode; matrices have standard deviation `std`."""
    torch.manual_seed(seed)
    net = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=std)
    return net


def loud_gates(backbone, seed: int = 0) -> None:
    """Make the thinking states matter: a gate at a = 0.3..0.9 and a projection of ordinary size."""
    torch.manual_seed(seed)
    with torch.no_grad():
        backbone.thinking_residual_Lambda.Lambda.normal_(mean=2.0)
        backbone.thinking_residual_gate_r.weight.normal_(std=0.3)
        backbone.thinking_residual_gate_i.weight.normal_(std=0.3)
        backbone.thinking_projection.weight.normal_(std=0.3)


def short_run(folder, **changes) -> dict:
    """Fields of a trainer's configuration for four steps on a CPU, without files, bars or reports."""
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        **changes,
    }
