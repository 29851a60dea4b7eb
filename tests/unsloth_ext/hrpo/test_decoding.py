"""Facts 1 and 2 of the method: decode = training forward, batch = single; and that `generate` is still `generate`."""

import pytest
import torch
from transformers import TextStreamer

import patches
from tests import tiny
from unsloth_ext import DelimiterMatcher, ThinkingConfig, attach_thinking, backbone_of, hybrid_generate
from unsloth_ext.hrpo import decoding
from unsloth_ext.hrpo.decoding import HybridSession, hybrid_decode
from unsloth_ext.hrpo.states import Warper


SOURCES = ("projection", "soft_embedding")
KEEP = ("thinking_states", "hidden_states", "log_probs")
COMMON = {"pad_token_id": 0, "eos_token_id": 1}


def make(family="qwen3", source="projection", dtype=torch.float32):
    net = attach_thinking(tiny.model(family, dtype=dtype), ThinkingConfig(thinking_source=source)).to(dtype)
    tiny.loud_gates(backbone_of(net))
    return net, DelimiterMatcher(tiny.tokenizer(), "#", 64)


def prompts():
    """Left-padded by 0, 3, 5 tokens; the last row has no padding and ends with the delimiter (which is prompt)."""
    ids = torch.randint(3, 40, (4, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 3, 5, 0)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    return ids, mask


def alive(completion):
    """Tokens up to and with the first EOS."""
    eos = completion == 1
    return (eos.cumsum(1) - eos.int()) == 0


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_decode_log_probs_equal_training_log_probs(family, source):
    """fp32, max |difference| <= 1e-5 of the logits (about 10); the plain forward differs by more than 0.1, so the states
    matter."""
    net, matcher = make(family, source)
    ids, attention = prompts()
    torch.manual_seed(1)
    out, trace = hybrid_generate(
        net,
        ids,
        matcher,
        attention_mask=attention,
        keep=KEEP,
        return_trace=True,
        max_new_tokens=24,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        **COMMON,
    )
    completion = out[:, 7:]
    live = alive(completion)
    assert trace.thinking_mask.any() and (~trace.thinking_mask & live).any(), "both kinds of token must occur"
    full = torch.cat([attention, live.long()], 1)
    shared = {"input_ids": out, "attention_mask": full, "position_ids": (full.cumsum(-1) - 1).clamp(min=0)}

    def log_probs(**thinking):
        logits = Warper(0.7, 0, 1.0, 0)(net(**shared, **thinking).logits[:, 6:-1])
        return logits.log_softmax(-1).gather(-1, completion[..., None]).squeeze(-1)

    frozen = log_probs(thinking_mask=trace.thinking_mask, thinking_embeds=trace.thinking_states)
    assert (frozen - trace.log_probs)[live].abs().max() <= 1e-4
    assert (log_probs() - trace.log_probs)[live].abs().max() > 0.1
    if source == "projection":
        rollout = log_probs(
            thinking_mask=trace.thinking_mask,
            recompute_thinking_projection=True,
            thinking_hidden_states_cache=trace.hidden_states,
        )
        assert (rollout - trace.log_probs)[live].abs().max() <= 1e-4


@pytest.mark.parametrize("source", SOURCES)
def test_batch_equals_single_and_cached_equals_uncached(source):
    """fp64, greedy, so that a wrong state shows as another token and rounding does not."""
    net, matcher = make(source=source, dtype=torch.float64)
    ids, attention = prompts()

    def decode(rows, **kw):
        return hybrid_generate(
            net, ids[rows], matcher, attention_mask=attention[rows], max_new_tokens=20, do_sample=False, **COMMON, **kw
        )[:, 7:]

    batch = decode(slice(None))
    assert torch.equal(batch, decode(slice(None), use_cache=False))
    for row in range(4):
        single = decode(slice(row, row + 1))[0]
        kept = alive(batch[row : row + 1])[0][: len(single)]
        assert torch.equal(single[kept], batch[row][: len(single)][kept])
        alone = hybrid_generate(
            net, ids[row : row + 1, attention[row].bool()], matcher, max_new_tokens=20, do_sample=False, **COMMON
        )
        assert torch.equal(alone[0, attention[row].sum() :], single)


def test_the_mask_stops_at_the_delimiter_and_at_eos():
    net, matcher = make()
    ids, attention = prompts()
    out, trace = hybrid_generate(
        net, ids, matcher, attention_mask=attention, return_trace=True, max_new_tokens=30, do_sample=True, **COMMON
    )
    completion = out[:, 7:]
    for row in range(4):
        for t in range(completion.shape[1]):
            seen = completion[row, : t + 1].tolist()
            text = tiny.tokenizer().decode(seen, skip_special_tokens=True)
            assert trace.thinking_mask[row, t].item() == ("#" not in text and 1 not in seen)


def test_a_row_that_ended_before_the_delimiter_thinks_no_more():
    """No completion holds the delimiter; every row meets one of many EOS tokens, and none is fused behind it."""
    net, matcher = make()
    ids, attention = prompts()
    ends, texts = list(range(1, 12)), tiny.tokenizer().batch_decode([[i] for i in range(64)])
    torch.manual_seed(0)
    out, trace = hybrid_generate(
        net,
        ids,
        matcher,
        attention_mask=attention,
        return_trace=True,
        keep=KEEP,
        max_new_tokens=12,
        do_sample=True,
        suppress_tokens=[i for i, text in enumerate(texts) if "#" in text],
        pad_token_id=0,
        eos_token_id=ends,
    )
    completion = out[:, 7:]
    ended = torch.isin(completion, torch.tensor(ends)).cumsum(1) > 0
    assert not matcher.complete(completion).any()
    assert ended[:, :-1].any(1).sum() >= 2 and (~ended).any()
    assert torch.equal(trace.thinking_mask, ~ended)


@pytest.mark.parametrize("source", SOURCES)
def test_a_closed_gate_is_plain_generate(source):
    """a = 1: the states are weighted by sqrt(eps) = 1e-4 and, with i = 0, not at all."""
    net, matcher = make(source=source)
    with torch.no_grad():
        backbone = backbone_of(net)
        backbone.thinking_residual_Lambda.Lambda.fill_(200.0)
        backbone.thinking_residual_gate_i.weight.zero_()
        backbone.thinking_residual_gate_i.bias.fill_(-1e4)
    ids, attention = prompts()
    kwargs = {"attention_mask": attention, "max_new_tokens": 20, "do_sample": True, **COMMON}
    torch.manual_seed(5)
    plain = net.generate(input_ids=ids, **kwargs)
    torch.manual_seed(5)
    assert torch.equal(hybrid_generate(net, ids, matcher, **kwargs), plain)


def test_greedy_keeps_the_soft_state_of_the_warped_distribution():
    net, matcher = make(source="soft_embedding")
    ids, attention = prompts()
    kwargs = {"attention_mask": attention, "max_new_tokens": 2, "keep": KEEP, "return_trace": True, **COMMON}
    _, greedy = hybrid_generate(net, ids, matcher, do_sample=False, temperature=0.5, top_k=5, **kwargs)
    from unsloth_ext import soft_embedding
    from unsloth_ext.common.logits import logits_of

    probs = Warper(0.5, 5, None, None)(logits_of(net, greedy.hidden_states[:, 0])).softmax(-1)
    expected = soft_embedding(net.get_input_embeddings(), probs)
    torch.testing.assert_close(greedy.thinking_states[:, 0], expected, rtol=1e-5, atol=1e-5)


def test_num_return_sequences_scores_streamer_and_stop_strings(capsys):
    net, matcher = make()
    tok = tiny.tokenizer()
    ids, attention = prompts()
    out = hybrid_generate(
        net,
        ids,
        matcher,
        attention_mask=attention,
        num_return_sequences=3,
        do_sample=True,
        max_new_tokens=6,
        return_dict_in_generate=True,
        output_scores=True,
        **COMMON,
    )
    assert out.sequences.shape == (12, 13) and len(out.scores) == 6 and out.scores[0].shape == (12, 64)
    single = hybrid_generate(
        net, ids[:1], matcher, do_sample=False, max_new_tokens=6, streamer=TextStreamer(tok), **COMMON
    )
    assert tok.decode(single[0, 7:]).split("<eos>")[0] in capsys.readouterr().out
    stopped = hybrid_generate(net, ids, matcher, attention_mask=attention, max_new_tokens=50, max_time=0.0, **COMMON)
    assert stopped.shape[1] == 8


@pytest.mark.parametrize("ablation", ["zero", "shuffle", "noise", "interpolate"])
def test_ablations_change_the_states_as_named(ablation):
    net, matcher = make()
    ids, attention = prompts()
    kwargs = {"attention_mask": attention, "max_new_tokens": 2, "do_sample": False, "keep": KEEP, "return_trace": True}
    _, plain = hybrid_generate(net, ids, matcher, **kwargs, **COMMON)
    _, other = hybrid_generate(net, ids, matcher, ablation=ablation, **kwargs, **COMMON)
    states, changed = plain.thinking_states[:, 0], other.thinking_states[:, 0]
    if ablation == "zero":
        assert not changed.any()
    elif ablation == "shuffle":
        assert torch.equal(changed, states.roll(1, 0))
    elif ablation == "interpolate":
        torch.testing.assert_close(changed, (states + states.roll(1, 0)) / 2)
    else:
        assert not torch.equal(changed, states)
        torch.testing.assert_close(changed.norm(dim=-1), states.norm(dim=-1), rtol=1e-5, atol=0)


def test_off_is_plain_generate_and_bad_calls_are_errors():
    net, matcher = make()
    ids, _ = prompts()
    plain = net.generate(input_ids=ids, max_new_tokens=5, do_sample=False, **COMMON)
    off = hybrid_generate(net, ids, matcher, ablation="off", max_new_tokens=5, do_sample=False, **COMMON)
    assert torch.equal(plain, off)
    with pytest.raises(ValueError, match="beam"):
        hybrid_generate(net, ids, matcher, num_beams=2, max_new_tokens=5, **COMMON)
    with pytest.raises(ValueError, match="ablation"):
        hybrid_generate(net, ids, matcher, ablation="maybe", max_new_tokens=5, **COMMON)
    with pytest.raises(ValueError, match="no thinking modules"):
        hybrid_generate(tiny.model(), ids, matcher, max_new_tokens=5, **COMMON)


def test_no_hook_stays_behind():
    net, matcher = make()
    ids, _ = prompts()
    hybrid_generate(net, ids, matcher, max_new_tokens=3, **COMMON)
    assert not net.get_input_embeddings()._forward_hooks and not net.lm_head._forward_pre_hooks
    assert patches.status()["base_model_forward"].live


def test_a_loop_with_hooks_is_not_compiled(monkeypatch):
    """`generate` would, for a static cache on a GPU."""
    seen = []
    monkeypatch.setattr(decoding, "_sample", lambda model, ids, _, __, config, *___, **____: seen.append(config) or ids)
    net = attach_thinking(tiny.model(), ThinkingConfig())
    session = HybridSession(net, DelimiterMatcher(tiny.tokenizer(), "#"))
    net.generate(torch.ones(1, 2, dtype=torch.long), custom_generate=hybrid_decode, hybrid=session, max_new_tokens=2)
    assert seen[0].disable_compile is True


def test_what_is_kept_has_a_name():
    net, matcher = make()
    with pytest.raises(ValueError, match="keep: 'states': choose from thinking_states, hidden_states, log_probs"):
        hybrid_generate(net, torch.tensor([[5]]), matcher, keep=("states",), **COMMON)


@pytest.mark.parametrize("world, sharded", [(2, True), (2, False), (1, True)])
def test_ranks_wait_for_each_other_only_where_weights_are_sharded(monkeypatch, world, sharded):
    seen = []
    net = attach_thinking(tiny.model(), ThinkingConfig())
    monkeypatch.setattr(type(net), "_sample", lambda _, ids, *args, **__: seen.append(args[3]) or ids)
    monkeypatch.setattr("transformers.generation.utils._get_torch_distributed_world_size", lambda: world)
    monkeypatch.setattr("transformers.integrations.fsdp.is_fsdp_managed_module", lambda _: sharded)
    session = HybridSession(net, DelimiterMatcher(tiny.tokenizer(), "#"))
    net.generate(torch.ones(1, 2, dtype=torch.long), custom_generate=hybrid_decode, hybrid=session, max_new_tokens=2)
    assert seen == [world > 1 and sharded]
