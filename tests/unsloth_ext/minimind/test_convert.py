"""Converted weights against the architecture written out here, names and all as in the published files."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from unsloth_ext import minimind_config
from unsloth_ext.minimind import presets
from unsloth_ext.minimind.convert import load_minimind


NAMES = ["minimind2-small", "minimind2-moe", "minimind3", "minimind3-moe"]
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 120, "head_dim": 8}


@pytest.fixture
def small(monkeypatch):
    """Presets of a size for tests."""

    def made(whole):
        config = whole()
        for name, value in SMALL.items():
            setattr(config, name, value)
        for name in ("moe_intermediate_size", "shared_intermediate_size"):
            if hasattr(config, name):
                setattr(config, name, 96)
        if hasattr(config, "attention_multiplier"):
            config.attention_multiplier = 8**-0.5
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"] * 2
        return config

    monkeypatch.setattr(presets, "PRESETS", {n: (lambda w=w: made(w)) for n, w in presets.PRESETS.items()})


def weights(name):
    """As MiniMind names them."""
    config, generator = minimind_config(name), torch.Generator().manual_seed(0)
    new = lambda *shape: torch.randn(*shape, generator=generator) * 0.3  # noqa: E731
    state = {"model.embed_tokens.weight": new(120, 64), "model.norm.weight": 1 + new(64)}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    kv = config.num_key_value_heads * 8
    for i in range(2):
        p = f"model.layers.{i}"
        state |= {f"{p}.{n}_layernorm.weight": 1 + new(64) for n in ("input", "post_attention")}
        for n, rows in (("q", 64), ("k", kv), ("v", kv), ("o", 64)):
            state[f"{p}.self_attn.{n}_proj.weight"] = new(rows, 64)
        if "3" in name:
            state |= {f"{p}.self_attn.{n}_norm.weight": 1 + new(8) for n in "qk"}
        places = [f"{p}.mlp.experts.{e}" for e in range(4)] if "moe" in name else [f"{p}.mlp"]
        if "moe" in name:
            state[f"{p}.mlp.gate.weight"] = new(4, 64)
        if name == "minimind2-moe":
            places.append(f"{p}.mlp.shared_experts.0")
        for place in places:
            state |= {f"{place}.{n}_proj.weight": new(96, 64) for n in ("gate", "up")}
            state[f"{place}.down_proj.weight"] = new(64, 96)
    return state


def norm(x, weight, eps):
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def turned(x):
    """(T, heads, 8) by RoPE of base 1e6."""
    angle = torch.arange(len(x))[:, None] * 1e6 ** (-torch.arange(0, 8, 2) / 8)
    cos, sin = (f(torch.cat([angle, angle], -1))[:, None] for f in (torch.cos, torch.sin))
    return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin


def forward(h, w, place):
    gate, up, down = (w[f"{place}.{n}_proj.weight"].T for n in ("gate", "up", "down"))
    return (F.silu(h @ gate) * (h @ up)) @ down


def logits(name, state, ids):
    config = minimind_config(name)
    eps, kv = config.rms_norm_eps, config.num_key_value_heads
    x = state["model.embed_tokens.weight"][ids]
    for i in range(2):
        w = {n.removeprefix(f"model.layers.{i}."): v for n, v in state.items() if f"layers.{i}." in n}
        h = norm(x, w["input_layernorm.weight"], eps)
        q, k, v = ((h @ w[f"self_attn.{n}_proj.weight"].T).view(len(ids), -1, 8) for n in "qkv")
        if "3" in name:
            q, k = (norm(a, w[f"self_attn.{n}_norm.weight"], eps) for n, a in (("q", q), ("k", k)))
        q, k = turned(q), turned(k)
        heads = []
        for a in range(8):
            b = a // (8 // kv)  # several queries share a key
            scores = (q[:, a] @ k[:, b].T / 8**0.5).masked_fill(
                torch.ones(len(ids), len(ids)).triu(1).bool(), -torch.inf
            )
            heads.append(scores.softmax(-1) @ v[:, b])
        x = x + torch.cat(heads, -1) @ w["self_attn.o_proj.weight"].T
        h = norm(x, w["post_attention_layernorm.weight"], eps)
        if "moe" not in name:
            x = x + forward(h, w, "mlp")
            continue
        chosen, which = (h @ w["mlp.gate.weight"].T).softmax(-1).topk(config.num_experts_per_tok)
        share = torch.zeros(len(ids), 4).scatter(1, which, chosen / chosen.sum(-1, keepdim=True))
        x = x + sum(share[:, e, None] * forward(h, w, f"mlp.experts.{e}") for e in range(4))
        if name == "minimind2-moe":
            x = x + forward(h, w, "mlp.shared_experts.0")
    return norm(x, state["model.norm.weight"], eps) @ state["lm_head.weight"].T


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_architecture(name, small, tmp_path):
    """1e-4 of logits of about 10, fp32."""
    state = weights(name)
    torch.save({**state, "model.freqs_cos": torch.zeros(3)}, tmp_path / "w.pth")
    ids = torch.randint(120, (1, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = load_minimind(tmp_path / "w.pth", name)(input_ids=ids).logits[0]
    wanted = logits(name, state, ids[0])
    assert wanted.std() > 1 and (found - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s.pop("model.norm.weight"), "model.norm.weight is missing, minimind3 has \\[64\\]"),
        (lambda s: s.update(more=torch.zeros(2)), "more is \\[2\\], minimind3 has none"),
        (lambda s: s.update({"lm_head.weight": torch.zeros(120, 64)}), "lm_head.weight is not model.embed_tokens"),
        (lambda s: s.update(note="text"), "does not hold only tensors"),
        (lambda s: s.update(code=Path), "cannot be read|no state dict that can be loaded safely"),
    ],
)
def test_other_files_are_refused(change, message, small, tmp_path):
    state = weights("minimind3")
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=message):
        load_minimind(tmp_path / "w.pth", "minimind3")


def test_a_mixture_without_an_expert_is_refused(small, tmp_path):
    state = weights("minimind3-moe")
    del state["model.layers.1.mlp.experts.3.up_proj.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"has no .*1.mlp.experts.3.up_proj.weight"):
        load_minimind(tmp_path / "w.pth", "minimind3-moe")
