"""Rotary embedding on and off, against transformers' own models, and what mixing rotated keys does."""

import pytest
import torch
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from tests import tiny
from unsloth_ext import AttentionShape, HeadwiseMapProjector, captured_kvq, create_structured_aligner
from unsloth_ext.kv_distill.rope import Rotary


ROPES = {
    "default": {"rope_type": "default", "rope_theta": 1e4},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64},
}


@pytest.mark.parametrize("name", ROPES)
def test_it_is_transformers_own_and_comes_off_again(name):
    """1e-5; yarn scales too."""
    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        rope_parameters=ROPES[name],
    )
    x, positions = torch.randn(2, 3, 4, 9, 16), torch.stack([torch.arange(9), torch.arange(9) + 100])
    rotary = Rotary(AttentionShape.of(config))
    cos, sin = LlamaRotaryEmbedding(config)(x, positions)
    wanted = torch.stack([apply_rotary_pos_emb(x[:, i], x[:, i], cos, sin)[0] for i in range(3)], dim=1)
    torch.testing.assert_close(rotary(x, positions), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotary.undo(wanted, positions), x, atol=1e-5, rtol=1e-5)
    assert (name == "yarn") == (rotary.embedding.attention_scaling != 1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_captured_keys_lose_their_positions(family):
    """1e-4: a token's first-layer key without rotary embedding is the same wherever it stands."""
    model = tiny.model(family)
    with torch.no_grad(), captured_kvq(model, [0]) as found:
        model(torch.tensor([[5, 9, 5, 7, 5]]))
    key = found[0][0][:, None]
    plain = Rotary(AttentionShape.of(model.config)).undo(key, torch.arange(5)[None])
    assert (key[:, :, :, 0] - key[:, :, :, 4]).abs().max() > 0.1
    for t in (2, 4):
        assert (plain[:, :, :, 0] - plain[:, :, :, t]).abs().max() <= 1e-4


def test_a_model_without_rotary_embedding_is_left_alone():
    x = torch.randn(1, 1, 4, 3, 8)
    rotary = Rotary(AttentionShape.of(tiny.config("gpt2")))
    assert torch.equal(rotary(x, torch.arange(3)[None]), x) and torch.equal(rotary.undo(x, torch.arange(3)[None]), x)


def test_the_aligner_counts_positions_from_zero_and_pads_not_at_all():
    """Compared without rotary embedding, an aligner that maps nothing gives the keys of a model's projection, 1e-5; the
    second row is padded on the left."""
    model = tiny.model("llama")
    ids, mask = torch.tensor([[5, 9, 5, 7, 5], [0, 0, 9, 7, 5]]), torch.tensor([[1] * 5, [0, 0, 1, 1, 1]])
    projected = []
    handle = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda _, __, out: projected.append(out))
    with torch.no_grad(), captured_kvq(model, [0]) as found:
        model(ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    handle.remove()
    plain = projected[0].view(2, 5, 2, 8).transpose(1, 2)
    shape = AttentionShape(1, 4, 2, 8, AttentionShape.of(model.config).rope)
    k, v, q = (x[:, None] for x in found[0])
    segments = torch.zeros_like(ids).masked_fill(mask == 0, -1)
    aligner = create_structured_aligner(shape, shape, rope_space="pre")
    with torch.no_grad():
        _, (theirs, _, _), _ = aligner.pairs((k, v, q), (k, v, q), segments)
    assert (((theirs[:, 0] - plain) * mask[:, None, :, None]).abs().max()) <= 1e-5
    assert ((k[:, 0] - plain) * mask[:, None, :, None]).abs().max() > 0.1


def attention(q, k):
    return (q[0, 0, 0] @ k[0, 0, 0].T) / q.shape[-1] ** 0.5


SHAPE = AttentionShape(1, 1, 1, 16, {"rope_theta": 1e4, "max_position_embeddings": 256})
SHORT = AttentionShape(1, 1, 1, 8, {"rope_theta": 1e4, "max_position_embeddings": 256})


@pytest.mark.parametrize("space,survives", [("rerotate", True), ("post", False)])
def test_relative_position_survives_mixing_of_widths(space, survives):
    """The same query and key content at every position: after the map, scores depend on distance alone (1e-4), which a map
    of rotated keys destroys (more than 0.05)."""
    torch.manual_seed(0)
    aligner = create_structured_aligner(SHAPE, SHORT, direction="teacher_to_student", rope_space=space)
    for name in ("k", "q"):
        torch.nn.init.normal_(aligner.maps[name].dim_map, std=0.4)
    positions = torch.arange(20)[None]
    rotary = Rotary(SHAPE)
    k, q = (rotary(torch.randn(16).expand(1, 1, 1, 20, 16), positions) for _ in range(2))
    with torch.no_grad():
        k_s, _, q_s = aligner(k, k, q)
    scores = attention(q_s, k_s)
    spread = max(scores.diagonal(-d).std() for d in range(15))
    assert spread <= 1e-4 if survives else spread > 0.05


@pytest.mark.parametrize("space,survives", [("rerotate", True), ("post", False)])
def test_relative_position_survives_resampling(space, survives):
    """Interpolated between two times, a rotated key is shorter and turned: norms differ by more than 1%, or by 1e-4."""
    aligner = create_structured_aligner(SHAPE, SHAPE, direction="teacher_to_student", rope_space=space)
    k = Rotary(SHAPE)(torch.ones(1, 1, 1, 40, 16), torch.arange(40)[None])
    with torch.no_grad():
        out, _, _ = aligner(k, k, k, torch.zeros(1, 40, dtype=torch.long), T_s=27)
    norms = out.norm(dim=-1).flatten()
    assert (norms.max() / norms.min() - 1 <= 1e-4) == survives
    assert (norms.max() / norms.min() - 1 > 0.01) != survives


def test_head_mixing_of_rotated_keys_is_what_the_trap_says():
    """Ten positions apart the same key has a cosine well below 1 where it is rotated, and 1 where it is not."""
    mix = HeadwiseMapProjector(4, 2, 16, 16)
    key = torch.randn(1, 1, 4, 1, 16, generator=torch.Generator().manual_seed(0)).expand(-1, -1, -1, 11, -1)
    four = AttentionShape(1, 4, 4, 16, SHAPE.rope)
    rotated = Rotary(four)(key, torch.arange(11)[None])
    with torch.no_grad():
        after, plain = mix(rotated), mix(key)
    assert F.cosine_similarity(after[..., 0, :], after[..., 10, :], dim=-1).max() < 0.9
    assert F.cosine_similarity(plain[..., 0, :], plain[..., 10, :], dim=-1).min() > 1 - 1e-5
