"""The table of signs on made-up histories."""

import copy

import pytest

from trl_ext.planner.diagnostics import SIGNS, WHOLE, Action, Thresholds, advise

from .histories import (
    BLURRED,
    CHANGES,
    DEAD,
    FIELDS,
    ILL,
    ONE_FOR_ALL,
    SETTLED,
    SPIKE,
    STALE,
    UNDECIDED,
    UNUSED,
    history,
)


def test_a_healthy_run_is_left_alone():
    assert advise(history()) == [] and advise([]) == []


@pytest.mark.parametrize("training, sign", CHANGES)
def test_a_sign_is_seen_and_no_other(training, sign):
    given = history(sign)
    before = copy.deepcopy(given)
    (found,) = advise(given, training=training)
    row = next(row for row in SIGNS if row.name == sign)
    assert found.sign == sign and found.actions == getattr(row, training) and found.seen and given == before
    assert sign in str(found) and all(str(action) in str(found) for action in found.actions)
    assert advise(given, training=training) == [found]


@pytest.mark.parametrize("training, sign", CHANGES)
def test_a_few_values_are_no_sign(training, sign):
    assert advise(history(sign, logs=5 if sign == SPIKE else 4), training=training) == []
    assert advise(history(sign, logs=6 if sign == SPIKE else 5), training=training) != []
    assert advise(history(sign, logs=3), Thresholds(window=2), training) != []


def test_a_sign_that_cannot_be_is_not_told():
    for sign in (UNDECIDED, SETTLED, STALE):
        assert advise(history(sign), training="soft") == []
    assert {sign for _, sign in CHANGES} == {sign.name for sign in SIGNS}


def test_plans_that_differ_and_say_nothing_are_not_used():
    """Another text's plan does as well as its own: if there is one for all the planner is to blame, else the executor."""
    unread = {"monitor/delta_nll_shuffled": 0.01}
    for share, wanted in ((0.2, [UNUSED]), (1.0, [ONE_FOR_ALL])):
        found = advise(history(**unread, **{"monitor/commonest_plan": share}))
        assert [advice.sign for advice in found] == wanted and unread.items() <= found[0].seen.items()
    without = {"monitor/commonest_plan": 1.0, "monitor/delta_nll_null": 0.0, **unread}
    assert [advice.sign for advice in advise(history(**without))] == [ONE_FOR_ALL, UNUSED]


def test_values_come_in_logs_of_their_own_and_nan_is_none():
    mixed = []
    for i, entry in enumerate(history(UNUSED, logs=5)):
        mixed += [
            {"step": i},
            {"monitor/delta_nll_null": entry["monitor/delta_nll_null"], "step": i},
            {"em/margin": 2.0, "step": i},
        ]
    assert [found.sign for found in advise(mixed)] == [UNUSED]
    mixed.append({"monitor/delta_nll_null": float("nan"), "step": 9})
    assert [found.sign for found in advise(mixed)] == [UNUSED]
    assert advise([{"monitor/delta_nll_null": float("nan"), "step": i} for i in range(9)]) == []


def test_only_the_last_window_counts():
    recovered = history(UNUSED) + history()[-5:]
    assert advise(recovered) == []
    assert [found.sign for found in advise(history() + history(UNUSED)[-5:])] == [UNUSED]


def test_both_halves_of_a_sign_are_needed():
    for change in ({"em/margin": 0.02}, {"em/flip_rate": 0.6}, {"monitor/commonest_plan": 1.0}):
        assert advise(history(**change), training="hard_em") == []
    late = [{**entry, "step": entry["step"] + 1000} for entry in history(SETTLED)]
    assert advise(late, training="hard_em") == []
    assert advise(late, Thresholds(early=2000), "hard_em")[0].sign == SETTLED
    for change in ({"monitor/entropy_b": 1.0}, {"monitor/max_prob_b": 0.5}):
        assert advise(history(SETTLED, **change), training="hard_em") == []


def test_a_spike_is_seen_where_gradients_were():
    dead = history(DEAD, logs=6)
    dead[-1]["monitor/planner_grad_norm"] = 1.0
    assert advise(dead) == []
    endless = history()
    endless[-1]["monitor/planner_grad_norm"] = float("inf")
    assert [found.sign for found in advise(endless)] == [SPIKE]
    assert advise([*endless, *history()[-5:]]) == []


def test_cos_has_to_stay_low():
    now_and_then = history(BLURRED)
    now_and_then[3]["monitor/cos"] = 0.6
    assert advise(now_and_then) == []
    assert advise(history(BLURRED))[0].seen == {"monitor/cos": 0.2, "monitor/l2": 0.3}


def test_several_signs_come_in_the_tables_order():
    everything = {name: value for values in ILL.values() for name, value in values.items()} | {"em/flip_rate": 0.6}
    everything["monitor/delta_nll_null"] = 0.0
    found = [x.sign for x in advise(history(**everything), training="hard_em")]
    assert found == [ONE_FOR_ALL, UNUSED, UNDECIDED, STALE, BLURRED, DEAD]


def test_actions_stay_within_bounds_and_go_one_way():
    actions = [action for sign in SIGNS for action in (*sign.soft, *sign.hard_em) if isinstance(action, Action)]
    assert {action.field for action in actions} == {*FIELDS, "learning_rate"}
    for action in actions:
        for value in (
            (0, 1, 2, 3, 5, 8, 15, 40) if action.field in WHOLE else (0.0, 0.05, 0.1, 0.29, 0.6, 1.0, 1.9, 9.0)
        ):
            up = action.factor > 1 or action.delta > 0
            new, steps = action(value), [value]
            assert new >= value if up else new <= value
            assert new == value or action.low <= new <= action.high
            assert isinstance(new, int) == (action.field in WHOLE)
            for _ in range(100):
                steps.append(action(steps[-1]))
            assert steps[-1] == action(steps[-1])  # comes to rest
    assert Action("x", factor=0.5, low=1)(0.4) == 0.4 and Action("x", delta=2, high=3)(7) == 7  # beyond: stays
    assert str(Action("x", delta=0.1, high=0.5)) == "x +0.1, at most 0.5"
    assert str(Action("x", factor=0.5, low=1)) == "x x 0.5, at least 1"


@pytest.mark.parametrize("sign", [BLURRED, DEAD])
def test_what_is_said_was_seen_last(sign):
    """Every measure of the history differs a little from log to log."""
    given = [
        {name: value + 1e-9 * i if name != "step" else value for name, value in log.items()}
        for i, log in enumerate(history(sign))
    ]
    for found in advise(given, training="hard_em"):
        measured = {name: value for name, value in found.seen.items() if name in given[-1]}
        assert measured and measured == {name: given[-1][name] for name in measured}
