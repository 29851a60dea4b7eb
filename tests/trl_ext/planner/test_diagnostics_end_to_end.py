"""Every row of the table in a run of its own: made sick in that way it shows the sign, and what the table does about it
moves the quantity that it is about the right way, against the same run left alone."""

from dataclasses import replace

import pytest
import torch

from trl_ext.planner import em, monitor_callback, probe
from trl_ext.planner import trainer as module
from trl_ext.planner.diagnostics import advise
from trl_ext.planner.monitor_callback import PlannerMonitorCallback
from unsloth_ext import backbone_of
from unsloth_ext.planner.forward_passes import read_text

from . import setups
from .histories import BLURRED, CHANGES, DEAD, ONE_FOR_ALL, SETTLED, SPIKE, STALE, UNDECIDED, UNUSED


# Texts of one letter, three times: a concept can tell which, and so can the letter before
ROWS = [{"prompt": f"{a}=", "completion": f"{a}{a}{a}"} for a in range(1, 9)]
BASE = {
    "max_steps": 16,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "z_dropout": 0.0,
    "usage_weight": 0.0,
    "lr_scheduler_type": "constant",
    "rows": ROWS,
    "e_step_every": 2,
    "types": [{"name": "a", "num_concepts": 8, "quota": 2}],
}
UNDECIDABLE = {"planner_weight": 0.0, "entropy_weight": 1.0, "e_step_every": 4, "max_steps": 32}


@torch.no_grad()
def certain(trainer, _):
    """A planner whose first concept is sure to come, whatever it reads."""
    backbone, batch = backbone_of(trainer.model), setups.batch_of(trainer, range(8))
    hidden = read_text(backbone, batch["plan_input_ids"], batch["plan_attention_mask"])[0].read()[:, -1].mean(0)
    head = backbone.unified_head
    head.table[head.vocabulary.outputs(0).start] = 8.0 * hidden / hidden.square().sum()


def deaf(where, monkeypatch):
    """A module whose executor is given no plan."""
    inner = where.executor_prefix

    def null(model, plans, null=None):
        rows = len(getattr(plans, "ids", plans))
        return inner(model, plans, torch.ones(rows, dtype=torch.bool))

    monkeypatch.setattr(where, "executor_prefix", null)


def deaf_e_step(_, monkeypatch):
    """Texts are as likely under every plan."""
    for each in (module, em):
        deaf(each, monkeypatch)


# What makes a run sick, the quantity, and whether it is to rise
CASES = {
    ("soft", ONE_FOR_ALL): (certain, {}, "planner/perplexity_a", True),
    ("hard_em", ONE_FOR_ALL): (certain, {}, "planner/perplexity_a", True),
    ("hard_em", UNDECIDED): (deaf_e_step, {**UNDECIDABLE, "learning_rate": 1e-2}, "em/flip_rate", False),
    ("hard_em", SETTLED): (certain, {}, "em/flip_rate", True),
    ("hard_em", STALE): (None, {**UNDECIDABLE, "learning_rate": 3e-2}, "em/staleness", False),
    ("soft", BLURRED): (None, {"temperature": 2.0}, "monitor/cos", True),
    ("hard_em", BLURRED): (None, {"temperature": 2.0}, "monitor/cos", True),
}
THRESHOLDS = {"window": 2, "margin": 2.0, "flips_high": 0.2, "staleness": 0.1, "cos": 0.9}


def run(folder, monkeypatch, training, sign, auto):
    """With this sign's actions alone; what was seen, and the quantity's values."""
    sicken, changes, quantity, _ = CASES[training, sign]
    monitor = PlannerMonitorCallback(auto, every=1, cooldown=1000, thresholds=THRESHOLDS)
    trainer = setups.trainer(folder, callbacks=[monitor], training=training, **{**BASE, **changes})
    with monkeypatch.context() as patch:
        patch.setattr(monitor_callback, "advise", lambda *args: [x for x in advise(*args) if x.sign == sign])
        if sicken is not None:
            sicken(trainer, patch)
        trainer.train()
    return monitor, setups.logged(trainer, quantity)


@pytest.mark.parametrize(
    "training, sign",
    [
        pytest.param(*case, marks=() if case in (("soft", ONE_FOR_ALL), ("hard_em", SETTLED)) else pytest.mark.slow)
        for case in CASES
    ],
)
def test_a_sick_run_shows_its_sign_and_the_action_helps(tmp_path, monkeypatch, training, sign):
    quantity, rises = CASES[training, sign][2:]
    (alone, without), (helped, after) = (run(tmp_path, monkeypatch, training, sign, auto) for auto in (False, True))
    assert list(alone.last_warned) == list(helped.last_warned) == [sign] and alone.applied == []
    fields = {change["field"] for change in helped.applied}
    assert fields and fields <= {*CHANGES[training, sign], "entropy_weight"}
    half = len(without) // 2
    before, now = sum(without[-half:]) / half, sum(after[-half:]) / len(after[-half:])
    assert (now > before) == rises and abs(now - before) > 0.02 * abs(before), (quantity, before, now)


@pytest.mark.parametrize("training", ["soft", "hard_em"])
def test_an_executor_that_is_given_no_plan_shows_it(tmp_path, monkeypatch, training):
    monitor = PlannerMonitorCallback(True, every=1, thresholds={"window": 2})
    changes = {**BASE, "max_steps": 3, "usage_weight": 0.3}
    trainer = setups.trainer(tmp_path, callbacks=[monitor], training=training, **changes)
    for each in (module, em, probe):
        deaf(each, monkeypatch)
    trainer.train()
    assert monitor.last_warned[UNUSED] == 2 and setups.logged(trainer, "monitor/delta_nll_null") == [0.0] * 3
    made = {change["field"]: change["new"] for change in monitor.applied if change["sign"] == UNUSED}
    assert made == CHANGES[training, UNUSED]


@pytest.mark.slow
def test_an_executor_that_cannot_read_all_words_uses_its_plan(tmp_path):
    """Soft: words dropped, and the plan is worth more; more plans dropped than the null plan needs, and it is worth less.
    One seed, among runs that differ much: docs/log.md has the means of five."""
    worth = []
    for changes in ({}, {"word_dropout": 0.3}, {"z_dropout": 0.3}):
        settings = {**BASE, "max_steps": 60, "z_dropout": 0.1, "usage_weight": 0.3, "learning_rate": 1e-2, **changes}
        trainer = setups.trainer(tmp_path, **settings)
        trainer.train()
        worth.append(trainer.probe(setups.batch_of(trainer, range(8)))["monitor/delta_nll_null"])
    assert worth[1] > 1.2 * worth[0] > 1.2 * 1.2 * worth[2], worth


@pytest.mark.slow
def test_in_hard_em_plans_are_worth_more_where_words_are_dropped(tmp_path, monkeypatch):
    """Plans are used by all these runs: a threshold that calls them unused, and the mean of five seeds."""
    monkeypatch.setattr(monitor_callback, "advise", lambda *args: [x for x in advise(*args) if x.sign == UNUSED])
    worth = []
    for auto in (False, True):
        found = []
        for seed in range(5):
            monitor = PlannerMonitorCallback(auto, every=5, cooldown=10, thresholds={"window": 1, "delta_nll": 9.0})
            settings = {**BASE, "max_steps": 60, "usage_weight": 0.3, "learning_rate": 1e-2, "z_dropout": 0.05}
            trainer = setups.trainer(tmp_path, callbacks=[monitor], training="hard_em", seed=seed, **settings)
            trainer.train()
            assert UNUSED in monitor.last_warned and {x["field"] for x in monitor.applied} <= {"word_dropout"}
            found.append(trainer.probe(setups.batch_of(trainer, range(8)))["monitor/delta_nll_shuffled"])
        worth.append(sum(found) / len(found))
    assert worth[1] > 1.1 * worth[0], worth  # seen: 2.84 and 3.40 nats a token


@pytest.mark.parametrize("training", ["soft", "hard_em"])
def test_a_planner_that_no_gradient_reaches_shows_it_until_it_does(tmp_path, monkeypatch, training):
    inner = module.plan_soft

    def detached(*args):
        soft = inner(*args)
        return replace(soft, embeds=soft.embeds.detach())

    told = []
    for sick in (True, False):
        monitor = PlannerMonitorCallback(every=100, thresholds={"window": 3})
        changes = {"planner_weight": 0.0} if sick and training == "hard_em" else {}
        trainer = setups.trainer(
            tmp_path, callbacks=[monitor], training=training, **{**BASE, "max_steps": 4, "z_dropout": 0.1, **changes}
        )
        with monkeypatch.context() as patch:
            if sick and training == "soft":
                patch.setattr(module, "plan_soft", detached)
            trainer.train()
        told.append(DEAD in monitor.last_warned)
        assert (max(setups.logged(trainer, "monitor/planner_grad_norm")) == 0) == sick
    assert told == [True, False]


@pytest.mark.parametrize("training", ["soft", "hard_em"])
def test_a_spike_is_seen_and_the_steps_after_it_are_smaller(tmp_path, monkeypatch, training):
    """At step 5 codewords shrink, which steepens what comes before the executor's norm, or grow, which makes the planner
    sure of what is not so. A logit's gradient has a bound, so that it cannot grow tenfold in six steps."""
    moved, factor = [], 0.01 if training == "soft" else 100
    for auto in (False, True):
        monkeypatch.setattr(monitor_callback, "advise", lambda *args: [x for x in advise(*args) if x.sign == SPIKE])
        monitor = PlannerMonitorCallback(auto, every=100, thresholds={"window": 3, "gradient_spike": 2.0})
        trainer = setups.trainer(tmp_path, callbacks=[monitor], training=training, **{**BASE, "max_steps": 8})
        table, steps, inner = backbone_of(trainer.model).unified_head.table, [], trainer.training_step

        def step(*args, table=table, steps=steps, inner=inner, trainer=trainer):
            if trainer.state.global_step == 5:
                table.data *= factor
            steps.append(table.detach().clone())
            return inner(*args)

        trainer.training_step = step
        trainer.train()
        assert SPIKE in monitor.last_warned and monitor.last_warned[SPIKE] <= 7, setups.logged(
            trainer, "monitor/planner_grad_norm"
        )
        assert {change["sign"] for change in monitor.applied} == ({SPIKE} if auto else set())
        fields = {change["field"] for change in monitor.applied}
        assert fields == (set(CHANGES[training, SPIKE]) if auto else set())
        moved.append((steps[-1] - steps[-2]).norm())
    assert moved[1] < 0.75 * moved[0]
