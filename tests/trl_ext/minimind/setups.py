"""A tiny MiniMind and its tokenizer."""

import functools

from transformers import Qwen3Config

from tests import tiny
from unsloth_ext import train_tokenizer


@functools.cache
def tokenizer():
    return train_tokenizer(["What is 7+5-3? Hello! 7+5=12;12-3=9####9 <think> answer"] * 3, vocab_size=280)


def model(seed: int = 0, std: float = 0.3):
    config = Qwen3Config(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return tiny.from_config(config, seed, std).eval()


def save(folder):
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def turns(*said: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(said)]
