"""Runs from which nothing can be learnt say so, once."""

import pytest
from transformers import TrainerControl, TrainerState

from tests.trl_ext.hrpo import setups
from tests.trl_ext.ppo import setups as ppo_setups
from trl_ext import RolloutDiagnostics
from trl_ext.common.rollout_diagnostics import WINDOW


HEALTHY = {"reward": 0.5, "frac_reward_zero_std": 0.2, "thinking/fraction": 0.6, "completions/delimiter_rate": 0.9}


def said(caplog, *phases, process_zero=True) -> list[str]:
    """Warnings of a run whose logs are those of each phase, a phase being (how often, what differs from healthy)."""
    callback, state = RolloutDiagnostics("####"), TrainerState(is_world_process_zero=process_zero)
    caplog.clear()
    for times, changes in phases:
        for i in range(times):
            state.global_step += 1
            callback.on_log(None, state, TrainerControl(), {**HEALTHY, "reward": 0.5 + 0.01 * (i % 3), **changes})
    return [r.message for r in caplog.records]


pytestmark = pytest.mark.usefixtures("transformers_warnings")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"frac_reward_zero_std": 1.0, "reward": 0.0}, ("same reward (mean 0)", "num_generations")),
        ({"reward": 0.0, "frac_reward_zero_std": None}, ("the reward was 0", "reward_funcs")),
        ({"completions/delimiter_rate": 0.0}, ("'####'", "max_completion_length", "answer_delimiter")),
        ({"thinking/log_ratio": 12.0}, ("log-ratio of a soft token was 12", "noise_likelihood='mean'")),
    ],
)
def test_ten_sick_logs_in_a_row_are_one_sentence(caplog, changes, words):
    assert said(caplog, (WINDOW - 1, changes)) == []
    assert said(caplog, (WINDOW - 1, changes), (1, {})) == []
    (sentence,) = said(caplog, (3 * WINDOW, changes))
    assert all(word in sentence for word in words) and sentence.startswith(f"step {WINDOW}:")
    assert said(caplog, (3 * WINDOW, changes), process_zero=False) == []


def test_a_thinking_share_that_collapses(caplog):
    (sentence,) = said(caplog, (WINDOW, {}), (2 * WINDOW, {"thinking/fraction": 0.01}))
    assert "from 60.0% to" in sentence and "beta" in sentence
    assert said(caplog, (WINDOW, {}), (2 * WINDOW, {"thinking/fraction": 0.1})) == []
    assert said(caplog, (3 * WINDOW, {"thinking/fraction": 0.01})) == [], "a small share from the start is no collapse"


def test_a_run_of_few_logs_says_it_at_its_end(caplog):
    """As ten steps to a log make it. One log alone is no series."""
    sick = {**HEALTHY, "reward": 0.0, "frac_reward_zero_std": 1.0, "completions/delimiter_rate": 0.0}
    for logs, count in ((HEALTHY, 3), (sick, 1), (sick, 3), (sick, WINDOW)):
        callback, state = RolloutDiagnostics("####"), TrainerState(is_world_process_zero=True)
        caplog.clear()
        callback.on_train_begin(None, state, TrainerControl())
        for i in range(count):
            callback.on_log(None, state, TrainerControl(), {**logs, "reward": logs["reward"] * (1 + i)})
        callback.on_train_end(None, state, TrainerControl())
        said = [r.message for r in caplog.records]
        assert len(said) == 2 * (logs is sick and count > 1)
        assert all(f"the last {count} logs" in sentence for sentence in said)


def test_a_resumed_run_goes_on_with_the_logs_before_it(caplog):
    """A collapse is seen against the share that the run began with."""
    callback, state = RolloutDiagnostics("####"), TrainerState(is_world_process_zero=True)
    state.log_history = [{**HEALTHY, "reward": 0.1 * (i % 3)} for i in range(WINDOW)] + [{"loss": 1.0}]
    callback.on_train_begin(None, state, TrainerControl())
    for i in range(WINDOW):
        callback.on_log(None, state, TrainerControl(), {**HEALTHY, "reward": 0.1 * (i % 3), "thinking/fraction": 0.01})
    (sentence,) = [r.message for r in caplog.records]
    assert "fell from 60.0% to" in sentence


def test_a_healthy_run_and_another_trainers_logs_say_nothing(caplog):
    assert said(caplog, (3 * WINDOW, {})) == []
    callback = RolloutDiagnostics()
    for i in range(2 * WINDOW):
        callback.on_log(None, TrainerState(), TrainerControl(), {"loss": 1.0})
        callback.on_log(None, TrainerState(), TrainerControl(), {"reward": 0.1 * (i % 3)})
    assert not caplog.records


@pytest.mark.parametrize("thinking, steps", [(True, WINDOW), (False, 2)])
def test_an_hrpo_run_with_no_reward_and_no_delimiter(tmp_path, caplog, thinking, steps):
    trainer = setups.hrpo(
        tmp_path, answer_delimiter="zyxw", max_steps=steps, per_device_train_batch_size=4, thinking=thinking
    )
    trainer.reward_funcs = [lambda completions, **_: [0.0] * len(completions)]
    trainer.train()
    warnings = [r.message for r in caplog.records if r.message.startswith("step")]
    assert f"step {steps}: in the last {steps} logs" in warnings[0] and "same reward (mean 0)" in warnings[0]
    assert len(warnings) == 1 + thinking and ("'zyxw'" in warnings[-1]) == thinking
    if thinking:
        assert all(entry["completions/delimiter_rate"] == 0 for entry in trainer.state.log_history if "reward" in entry)


def test_ppo_with_no_reward(tmp_path, caplog):
    trainer = ppo_setups.ppo(tmp_path, max_steps=2 * WINDOW)  # two steps a rollout
    trainer.reward_funcs = [lambda completions, **_: [0.0] * len(completions)]
    trainer.train()
    assert [r.message for r in caplog.records if "the reward was 0" in r.message]
