"""Rows that have ended leave the forwards, and what is returned stays the same."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import DynamicCache, StoppingCriteria
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer
from transformers.generation.streamers import BaseStreamer

from tests import tiny
from tests.trl_ext.hrpo import setups
from tests.trl_ext.hrpo.test_trainer import loud, one_batch
from tests.unsloth_ext.hrpo.test_decoding import KEEP, SOURCES, make, prompts
from unsloth_ext import hybrid_generate
from unsloth_ext.common.compat import CACHE
from unsloth_ext.hrpo import decoding, live_rows
from unsloth_ext.hrpo.live_rows import LiveRows, can_drop_rows


ENDS = [1, *range(50, 64)]  # many ends, so that rows end at different steps


def fed(model):
    """The number of rows of each forward from now on. It reads the embedding, whose hooks count as harmless."""
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    return seen


def decode(net, matcher, seed=0, **kwargs):
    ids, attention = prompts()
    torch.manual_seed(seed)
    arguments = {"attention_mask": attention, "max_new_tokens": 40, "eos_token_id": ENDS, "pad_token_id": 0, **kwargs}
    return hybrid_generate(net, ids, matcher, keep=KEEP, return_trace=True, **arguments)


def both_ways(monkeypatch, net, matcher, **kwargs):
    """What decoding returns with and without dropping, and the rows of each forward with it."""
    seen = fed(net)
    found = decode(net, matcher, **kwargs)
    rows = list(seen)
    with monkeypatch.context() as patch:
        patch.setattr(decoding, "can_drop_rows", lambda *_: False)
        wanted = decode(net, matcher, **kwargs)
    assert set(seen[len(rows) :]) == {rows[0]}
    return found, wanted, rows


def assert_equal(found, wanted, ends):
    """Tokens and masks are equal, and states, hidden states and log-probs wherever they are used.

    fp64: products of fewer rows may be rounded differently, by about 1e-15 of numbers of about 10.
    """
    (ids, trace), (wanted_ids, wanted_trace) = found, wanted
    assert torch.equal(ids, wanted_ids) and torch.equal(trace.thinking_mask, wanted_trace.thinking_mask)
    stops = torch.isin(ids[:, 7:], torch.tensor(ends))
    live = (stops.cumsum(1) - stops.long()) == 0
    for name, used in (("thinking_states", trace.thinking_mask), ("hidden_states", live), ("log_probs", live)):
        pair = [getattr(x, name)[used] for x in (trace, wanted_trace)]
        torch.testing.assert_close(*pair, rtol=0, atol=1e-6 if name == "log_probs" else 1e-10)  # log-probs are fp32


@pytest.mark.parametrize(
    "kwargs", [{"do_sample": False}, {"do_sample": True, "top_k": 0}, {"do_sample": True}], ids=str
)
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_everything_is_as_with_all_rows(monkeypatch, family, source, kwargs):
    net, matcher = make(family, source, torch.float64)
    dropped = set()
    for seed in range(3):
        found, wanted, rows = both_ways(monkeypatch, net, matcher, seed=seed, num_return_sequences=1, **kwargs)
        assert_equal(found, wanted, ENDS)
        assert rows == sorted(rows, reverse=True)
        dropped |= set(rows)
    assert len(dropped) >= 2


class _Streamer(BaseStreamer):
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


class _AtLength(StoppingCriteria):
    """Ends row i at 8 + i tokens."""

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids.shape[1] >= torch.arange(len(input_ids)) + 8


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_return_sequences": 3, "do_sample": True},
        {"stop_strings": ["a", "7"], "tokenizer": tiny.tokenizer()},
        {"max_new_tokens": None, "max_length": 20},
        {"max_new_tokens": 1},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
    ],
    ids=lambda kwargs: next(iter(kwargs)),
)
def test_arguments_of_generate(monkeypatch, kwargs):
    net, matcher = make(dtype=torch.float64)
    found, wanted, rows = both_ways(monkeypatch, net, matcher, **kwargs)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1].thinking_mask, wanted[1].thinking_mask)
    assert rows[-1] < rows[0] or kwargs["max_new_tokens"] == 1


def test_criteria_and_streamers_see_all_rows(monkeypatch):
    net, matcher = make(dtype=torch.float64)
    streamer = _Streamer()
    kwargs = {"streamer": streamer, "stopping_criteria": [_AtLength()], "eos_token_id": 1, "suppress_tokens": [1]}
    found, wanted, rows = both_ways(monkeypatch, net, matcher, **kwargs)
    assert rows == [4, 3, 2, 1]
    assert torch.equal(found[0], wanted[0])
    half = len(streamer.got) // 2
    assert streamer.got[:half] == streamer.got[half:] and len(streamer.got[half - 2]) == 4


def test_with_an_adapter(monkeypatch):
    net, matcher = make(dtype=torch.float64)
    net = get_peft_model(net, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    net.enable_input_require_grads()  # as TRL does; its hook is no reason to feed all rows
    found, wanted, rows = both_ways(monkeypatch, net, matcher)
    assert_equal(found, wanted, ENDS)
    assert rows[-1] < rows[0]


@pytest.mark.parametrize(
    "why", ["returned cache", "own cache", "no cache", "no EOS", "hook", "ablation", "other cache"]
)
def test_all_rows_are_fed_where_somebody_sees_their_number(why):
    net, matcher = make(dtype=torch.float64)
    kwargs = {
        "returned cache": {"return_dict_in_generate": True},
        "own cache": {"past_key_values": DynamicCache(config=net.config)},
        "no cache": {"use_cache": False},
        "no EOS": {"eos_token_id": None, "stop_strings": ["a", "7"], "tokenizer": tiny.tokenizer()},
        "ablation": {"ablation": "shuffle"},
        "other cache": {"cache_implementation": "static"},
    }.get(why, {})
    if why == "no EOS":
        net.generation_config.eos_token_id = None
    if why == "hook":
        net.lm_head.register_forward_hook(lambda *_: None)
    rows = fed(net)
    decode(net, matcher, **kwargs)
    assert len(rows) > 2 and set(rows) == {4}


def test_a_rollout_of_the_trainer(monkeypatch, tmp_path):
    """fp32: log-probs to 1e-5, as in the trainer's own tests of the importance ratio."""

    def rollout():
        torch.manual_seed(0)
        trainer = setups.hrpo(tmp_path, max_completion_length=60, recompute="rollout")
        loud(trainer)
        rows = fed(trainer.model)
        return one_batch(trainer), rows

    found, rows = rollout()
    monkeypatch.setattr(decoding, "can_drop_rows", lambda *_: False)
    wanted, _ = rollout()
    assert min(rows) < rows[0]
    real = wanted["completion_mask"].bool()
    for name in ("completion_ids", "completion_mask", "thinking_mask"):
        assert torch.equal(found[name], wanted[name])
    for name in ("rollout_logps", "hidden_states"):
        torch.testing.assert_close(found[name][real], wanted[name][real], rtol=1e-5, atol=1e-5)


def test_what_has_rows_that_cannot_be_told_apart_is_left_alone(monkeypatch):
    net, _ = make()
    config = net.generation_config
    config._eos_token_tensor = torch.tensor([1])
    assert can_drop_rows(net, config, DynamicCache(config=net.config))
    assert not can_drop_rows(net, config, DynamicCache(config=net.config, offloading=True))
    monkeypatch.setattr(live_rows, "on_unsloth", lambda _: True)
    assert not can_drop_rows(net, config, DynamicCache(config=net.config))

    recurrent = DynamicCache()
    recurrent.layers = [DynamicLayer(), LinearAttentionLayer()]
    live = LiveRows()
    live.ended = torch.tensor([True, False, False])
    shared, nested = {"position_ids": torch.zeros(1, 3)}, {"position_ids": torch.zeros(3, 3, 1)}
    for other in ({CACHE: recurrent}, shared, nested, {"token_types": [0, 0, 0]}):
        inputs = {"input_ids": torch.zeros(3, 1), CACHE: DynamicCache(), **other}
        assert live._narrow(net, (), inputs) is None
    assert live.rows == slice(None)


def test_sharded_models_feed_their_last_rows_on():
    """Their loop does not stop before those of the other processes."""
    live = LiveRows()
    live.ended = torch.tensor([True, False])
    inputs = {"input_ids": torch.tensor([[5], [6]]), CACHE: DynamicCache()}
    for _ in range(2):
        _, narrowed = live._narrow(None, (), inputs)
        assert narrowed["input_ids"].tolist() == [[6]]
        assert live.widen(torch.tensor([[7.0]])).tolist() == [[7.0], [7.0]]
        live.ended = torch.tensor([True, True])
