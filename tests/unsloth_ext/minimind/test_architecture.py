"""RMSNorm, attention and YaRN of the presets, at their own widths, against their definitions; and not as the tutorial has
them. The weights' names and the rest of the architecture are in test_convert.py."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

from unsloth_ext import minimind_config


NAMES = ["minimind2-small", "minimind2", "minimind2-moe", "minimind3", "minimind3-moe", "tiny"]
EPS = {name: 1e-5 if name.startswith("minimind2") else 1e-6 for name in NAMES}
TWO = [("minimind2-small", 2), ("minimind3", 4)]  # key/value heads for 8 query heads


def model(name, yarn=False, **kwargs):
    """One layer of the preset's widths, a small vocabulary and feed-forward, and weights that make scores of order 1."""
    config = minimind_config(name, yarn)
    config.num_hidden_layers, config.vocab_size, config.intermediate_size = 1, 64, 32
    for field in ("moe_intermediate_size", "shared_intermediate_size"):
        if hasattr(config, field):
            setattr(config, field, 32)
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"]
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(config, **kwargs)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=1.5 * parameter.shape[-1] ** -0.5)
            else:
                parameter.normal_(mean=1.0, std=0.3)
    return net.eval()


def tokens(rows=2, length=13):
    return torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(1))


def norm(x, weight, eps):
    return weight * x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()


def frequencies(width, factor=1.0, base=1e6):
    """(width / 2) angles a position. YaRN: pairs that turn more than 32 times in 2,048 positions stay, those that turn less
    than once are slowed by the factor, a ramp between."""
    plain = 1 / base ** (torch.arange(0, width, 2) / width)

    def pair(turns):
        return width * math.log(2048 / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = math.floor(pair(32)), math.ceil(pair(1))
    ramp = ((torch.arange(width // 2) - low) / (high - low)).clamp(0, 1)
    return plain * (1 - ramp) + plain / factor * ramp


def attention(net, x, positions, freqs, *, key_of=lambda head, share: head // share, normed=True):
    """(B, T, hidden) of the only layer, head by head; `positions` (T)."""
    layer, config = net.model.layers[0].self_attn, net.config
    heads, kv = config.num_attention_heads, config.num_key_value_heads
    width = layer.head_dim
    angle = positions[:, None].float() * freqs.float()
    cos, sin = (f(torch.cat([angle, angle], -1)).to(x.dtype) for f in (torch.cos, torch.sin))

    def turned(a):
        return a * cos + torch.cat([-a[..., width // 2 :], a[..., : width // 2]], -1) * sin

    q, k, v = (
        (x @ p.weight.T).unflatten(-1, (-1, width)).transpose(1, 2)  # (B, heads, T, width)
        for p in (layer.q_proj, layer.k_proj, layer.v_proj)
    )
    if normed and hasattr(layer, "q_norm"):
        q, k = (norm(a, n.weight, config.rms_norm_eps) for a, n in ((q, layer.q_norm), (k, layer.k_norm)))
    future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    found = []
    for head in range(heads):
        other = key_of(head, heads // kv)
        scores = turned(q[:, head]) @ turned(k[:, other]).mT / width**0.5
        found.append(scores.masked_fill(future, -torch.inf).softmax(-1) @ v[:, other])
    return torch.cat(found, -1) @ layer.o_proj.weight.T


def watched(net, **inputs):
    """What goes into the layer's attention and comes out, (B, T, hidden) each."""
    seen = []
    hook = net.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"], output[0])), with_kwargs=True
    )
    with torch.no_grad():
        net(**inputs)
    hook.remove()
    return seen[0]


# -- RMSNorm --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_rms_norm_multiplies_by_x(name):
    """1e-6 relative against float64, where the mean square is as small as eps: 1e-5 and 1e-6 can be told apart. The print
    weight * rsqrt(mean(x^2) + eps) has no x in it."""
    net, eps = model(name), EPS[name]
    layer = net.model.layers[0]
    norms = [net.model.norm, layer.input_layernorm, layer.post_attention_layernorm]
    if name in ("minimind3", "minimind3-moe", "tiny"):
        norms += [layer.self_attn.q_norm, layer.self_attn.k_norm]
    for module in norms:
        x = torch.randn(5, len(module.weight)) * 2e-3
        with torch.no_grad():
            found, weight = module(x).double(), module.weight.double()
        wanted = norm(x.double(), weight, eps)
        scale = wanted.abs().max()
        assert (found - wanted).abs().max() <= 1e-6 * scale
        for other in {1e-5, 1e-6} - {eps}:
            assert (found - norm(x.double(), weight, other)).abs().max() > 0.1 * scale
        printed = weight * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
        assert (found - printed).abs().max() > 10 * scale


# -- attention ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_attention_is_the_one_written_out(name):
    """1e-5 of its largest value, fp32: causal, RoPE of base 1e6, blocks of query heads on one key/value head, queries and
    keys normalised in the third generation. Each of these left out or changed is seen."""
    net = model(name)
    ids = tokens()
    x, found = watched(net, input_ids=ids)
    width = net.model.layers[0].self_attn.head_dim
    with torch.no_grad():
        here = torch.arange(ids.shape[1])

        def off(freqs=None, **changes):
            wanted = attention(net, x, here, frequencies(width) if freqs is None else freqs, **changes)
            return ((found - wanted).abs().max() / wanted.abs().max()).item()

        assert off() <= 1e-5
        assert off(frequencies(width, base=1e4)) > 0.05
        assert off(key_of=lambda head, share: head % (8 // share)) > 0.05  # interleaved
        if hasattr(net.model.layers[0].self_attn, "q_norm"):
            assert off(normed=False) > 0.05
    assert hasattr(net.model.layers[0].self_attn, "q_norm") == (not name.startswith("minimind2"))


@pytest.mark.parametrize("name, kv", TWO)
def test_a_key_value_head_serves_its_block_of_query_heads(name, kv):
    """At each position: other values in one key/value head change the outputs of its block of 8 / kv query heads, all of
    them, and no bit of the others."""
    net, inner = model(name), []
    layer = net.model.layers[0].self_attn
    assert net.config.num_key_value_heads == kv
    layer.o_proj.register_forward_pre_hook(lambda module, args: inner.append(args[0]))
    with torch.no_grad():
        net(input_ids=tokens())
        for head in range(kv):
            block = layer.v_proj.weight[head * layer.head_dim : (head + 1) * layer.head_dim]
            kept = block.clone()
            block += 1.0
            net(input_ids=tokens())
            block.copy_(kept)
            moved = (inner[-1] != inner[0]).unflatten(-1, (8, layer.head_dim)).any(-1)  # (B, T, heads)
            own = torch.arange(8) // (8 // kv) == head
            assert torch.equal(moved, own.expand_as(moved))


@pytest.mark.parametrize("name", NAMES)
def test_cached_is_uncached_and_sdpa_is_eager(name):
    """Logits to 1e-5 of the largest: seven tokens at once and then one by one, against the whole; and the two ways."""
    ids = tokens()
    net, eager = model(name), model(name, attn_implementation="eager")
    assert net.config._attn_implementation == "sdpa" and eager.config._attn_implementation == "eager"
    with torch.no_grad():
        whole = net(input_ids=ids, use_cache=False).logits
        cache = DynamicCache(config=net.config)
        parts = [
            net(input_ids=part, past_key_values=cache, use_cache=True).logits for part in ids.split([7] + [1] * 6, 1)
        ]
        other = eager(input_ids=ids, use_cache=False).logits
    assert cache.get_seq_length() == ids.shape[1]
    for found in (torch.cat(parts, 1), other):
        assert (found - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_embeddings_are_tied(name):
    net = model(name)
    assert net.get_output_embeddings().weight is net.get_input_embeddings().weight


# -- YaRN -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["minimind2-small", "minimind2-moe", "minimind3"])
def test_yarn_attends_beyond_2048_with_sixteen_and_not_four(name):
    """Positions up to 32,767. 2e-3 of the largest value: the last bit of an fp32 angle of 32,767 is 2e-3. The factor 4
    and no stretching give others."""
    positions = torch.linspace(0, 32767, 40).long()
    net = model(name, yarn=True)
    assert (positions > 2048).sum() > 30
    ids = tokens(length=40)
    # The mask says that it is one text: positions that jump would be read as a packed row
    x, found = watched(net, input_ids=ids, position_ids=positions[None], attention_mask=torch.ones_like(ids))
    width = net.model.layers[0].self_attn.head_dim
    off = {}
    with torch.no_grad():
        for factor in (16.0, 4.0, 1.0):
            wanted = attention(net, x, positions, frequencies(width, factor))
            off[factor] = ((found - wanted).abs().max() / wanted.abs().max()).item()
    assert off[16.0] <= 2e-3 and min(off[4.0], off[1.0]) > 0.05, off


@pytest.mark.parametrize("name", NAMES)
def test_yarns_frequencies_are_not_those_of_factor_four(name):
    """1e-6 relative: the slowest pair is 16 times as slow as without YaRN, and 4 times as slow as with the factor 4."""
    found = model(name, yarn=True).model.rotary_emb.inv_freq
    width = 2 * len(found)
    assert (found / frequencies(width, 16.0) - 1).abs().max() <= 1e-6
    assert frequencies(width)[-1] / found[-1] == pytest.approx(16, rel=1e-6)
    assert frequencies(width, 4.0)[-1] / found[-1] == pytest.approx(4, rel=1e-6)
