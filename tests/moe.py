"""Tiny mixtures of experts as MiniMind has them: Granite's with a shared expert, two of four; Qwen3's, one of four."""

import torch
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from tests import tiny
from unsloth_ext import minimind_config


KINDS = ("minimind2-moe", "minimind3-moe")
SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 16,
    "head_dim": 8,
    "shared_intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "eos_token_id": 1,
    "bos_token_id": 1,
    "attention_multiplier": 8**-0.5,
}


def config(kind: str, **changes) -> PreTrainedConfig:
    """A preset's, of a size for tests."""
    preset = minimind_config(kind)
    small = {name: value for name, value in SMALL.items() if hasattr(preset, name)}
    return type(preset)(**{**preset.to_dict(), **small, **changes})


def model(kind: str, seed: int = 0, std: float = 0.3, **changes) -> PreTrainedModel:
    """A random one whose router has opinions."""
    return tiny.from_config(config(kind, **changes), seed, std)


def routers(net: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {n: p for n, p in net.named_parameters() if n.endswith(("mlp.gate.weight", "router.weight"))}


def experts(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in net.named_parameters() if ".experts." in n}


def batch(rows: int = 3, length: int = 11, vocabulary: int = 64) -> dict[str, torch.Tensor]:
    """Rows of unlike lengths, padded on the right."""
    ids = torch.randint(3, vocabulary, (rows, length), generator=torch.Generator().manual_seed(5))
    mask = torch.arange(length)[None] < torch.arange(length, length - 3 * rows, -3)[:, None]
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def auxiliary(logits: tuple[torch.Tensor, ...], top_k: int, mask: torch.Tensor) -> torch.Tensor:
    """E sum_i f_i P_i over the tokens of all layers that are no padding, with f that sums to top_k; in float64.

    Args:
        logits: of each layer, (B T, E).
        mask (B, T): 0 at padding.
    """
    rows = torch.cat([layer[mask.flatten().bool()] for layer in logits]).double()
    chosen = rows.topk(top_k, dim=-1).indices
    f = F.one_hot(chosen, rows.shape[-1]).sum(1).double().mean(0)
    return rows.shape[-1] * (f * rows.softmax(-1).mean(0)).sum()
