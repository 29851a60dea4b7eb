"""Evaluation, its interval, and the look before training."""

import logging

import pytest
import torch
from datasets import Dataset

from tests import tiny
from trl_ext.cli.console import PlainConsole
from trl_ext.tasks.dry_run import check_rewards, dry_run
from trl_ext.tasks.evaluation import Evaluation, evaluate, wilson_interval
from trl_ext.tasks.files import DataError
from trl_ext.tasks.reward import make_reward
from unsloth_ext import attach_thinking, backbone_of


ROWS = Dataset.from_list([{"prompt": f"{a}+{b}=", "answer": str(a + b)} for a in range(3) for b in range(1, 12, 3)])


def test_wilson_interval_against_published_values():
    """Newcombe (1998), Statistics in Medicine 17:857, table I, method 3: to four digits."""
    for successes, n, low, high in [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)]:
        assert wilson_interval(successes, n) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(20, 20)[1] == pytest.approx(1)


def test_the_summary_gets_all_numbers_and_no_text():
    found = Evaluation(
        n=2,
        accuracy=0.5,
        low=0.1,
        high=0.9,
        format_rate=1.0,
        mean_length=3.0,
        thinking_share=0.2,
        completions=["a", "b"],
    )
    assert found.numbers() == {
        "n": 2,
        "accuracy": 0.5,
        "low": 0.1,
        "high": 0.9,
        "format_rate": 1.0,
        "mean_length": 3.0,
        "thinking_share": 0.2,
    }


@pytest.mark.parametrize("batch", [1, 5, 12])
def test_batches_do_not_change_greedy_results(batch):
    net = attach_thinking(tiny.model(dtype=torch.float64)).double()
    tiny.loud_gates(backbone_of(net))
    options = {"delimiter": "#", "max_new_tokens": 12}
    result = evaluate(net, tiny.tokenizer(), ROWS, batch_size=batch, **options)
    reference = evaluate(net, tiny.tokenizer(), ROWS, batch_size=12, **options)
    assert result == reference and 0 < result.thinking_share <= 1 and result.n == 12
    off = evaluate(net, tiny.tokenizer(), ROWS, batch_size=batch, thinking="off", **options)
    assert off.thinking_share == 0 and off.completions != result.completions


@pytest.mark.parametrize("thinking", ["on", "off"])
def test_greedy_decoding_is_not_told_that_sampling_is_ignored(monkeypatch, thinking):
    """Thinking states are made with temperature and top_k; plain greedy decoding is not given them."""
    said = []
    monkeypatch.setattr(logging.getLogger("transformers"), "handlers", [handler := logging.Handler()])
    handler.emit = said.append
    logging.Logger.warning_once.cache_clear()
    options = {"delimiter": "#", "max_new_tokens": 2, "temperature": 0.7, "thinking": thinking}
    evaluate(attach_thinking(tiny.model()), tiny.tokenizer(), ROWS, **options)
    assert not [record.getMessage() for record in said]


@pytest.mark.parametrize("do_sample", [True, False])
@pytest.mark.parametrize("thinking", ["on", "off"])
def test_the_temperature_is_of_sampling_and_of_thinking_states(monkeypatch, thinking, do_sample):
    """Without the samplers that a configuration truncates by."""
    net = attach_thinking(tiny.model())
    seen, generate = [], net.generate
    monkeypatch.setattr(net, "generate", lambda *a, **k: seen.append(k["generation_config"]) or generate(*a, **k))
    evaluate(
        net,
        tiny.tokenizer(),
        ROWS,
        delimiter="#",
        max_new_tokens=2,
        temperature=0.7,
        thinking=thinking,
        do_sample=do_sample,
    )
    for config in seen:
        asked = config.temperature, config.top_k, config.top_p
        assert asked == ((0.7, 0, 1.0) if thinking == "on" or do_sample else (None, None, None))
    assert seen


def test_dry_run_counts_and_warns(capsys):
    rows = ROWS.select(range(2))
    answers = rows["answer"]
    found = dry_run(rows, [f"## {answers[0]}", "nothing"], make_reward("##"), "##", PlainConsole())
    assert (found.parse_rate, found.rewards, found.gold_reward) == (0.5, {0.0: 1, 1.0: 1}, 1.0)
    dry_run(rows, ["x", "y"], make_reward("##"), "##", PlainConsole())
    assert "Every sampled reward is 0" in capsys.readouterr().out


def test_dry_run_stops_where_nothing_can_be_earned():
    def never(completions, answer):
        return [0.0] * len(completions)

    with pytest.raises(DataError, match="no reward can ever be earned: never"):
        dry_run(ROWS.select(range(2)), ["x", "y"], never, "##", PlainConsole())


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
def test_rewards_that_are_no_numbers_are_named(bad):
    with pytest.raises(DataError, match=r"mine returned .* for row 1"):
        check_rewards("mine", [0.0, bad])


@pytest.mark.parametrize("own, ends", [(None, []), (0, [0]), ([1, 5], [1, 5])])
def test_answers_end_where_the_model_says_or_nowhere(own, ends):
    """An end token 0 is one, and a tokenizer without one lets every answer run on."""
    net, tok = tiny.model(dtype=torch.float64).double(), tiny.tokenizer()
    tok.eos_token = None
    net.generation_config.eos_token_id = own
    found = evaluate(net, tok, ROWS.select(range(4)), delimiter="#", max_new_tokens=8)
    ids = [tok(row["prompt"], return_tensors="pt")["input_ids"] for row in ROWS.select(range(4))]
    rows = [net.generate(i, max_new_tokens=8, do_sample=False, pad_token_id=0)[0, i.shape[1] :].tolist() for i in ids]
    lengths = [next((t + 1 for t, token in enumerate(row) if token in ends), 8) for row in rows]
    assert found.mean_length == sum(lengths) / 4


@pytest.mark.parametrize("thinking", ["on", "off"])
def test_nothing_is_generated_behind_the_models_positions(thinking):
    net = attach_thinking(tiny.model())
    with pytest.raises(ValueError, match="up to 300 new tokens: more than the model's 256 positions"):
        evaluate(net, tiny.tokenizer(), ROWS, delimiter="#", max_new_tokens=300, thinking=thinking)


def test_conversations_need_a_chat_template():
    rows = ROWS.map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    with pytest.raises(ValueError, match="has no chat template, but the prompts are conversations"):
        evaluate(tiny.model(), tiny.tokenizer(), rows, delimiter="#", max_new_tokens=3)
