"""The callback that reads the signs: by hand, and in transformers' own loop."""

import copy
import json
import logging
import random
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments, get_scheduler
from transformers.utils import logging as hf_logging

from trl_ext.common.checkpointing import SafeCheckpointMixin
from trl_ext.planner import monitor_callback as module
from trl_ext.planner.diagnostics import Thresholds
from trl_ext.planner.monitor_callback import PlannerMonitorCallback, scale_learning_rate

from .histories import BLURRED, CHANGES, FIELDS, ILL, SETTLED, SPIKE, STALE, UNUSED, history


# -- the callback, by hand ----------------------------------------------------------------------------------------------


def parts(schedule="linear", **fields):
    args = SimpleNamespace(**{**FIELDS, "world_size": 1, "learning_rate": 0.1, "training": "soft", **fields})
    layers = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": layers[0].parameters()}, {"params": layers[1].parameters(), "lr": 0.3}]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    return args, optimizer, get_scheduler(schedule, optimizer, num_warmup_steps=2, num_training_steps=1000)


@pytest.fixture
def warnings(monkeypatch):
    told = []
    monkeypatch.setattr(module.logger, "warning", told.append)
    return told


class Run:
    """Logs, one after another, to a callback."""

    def __init__(self, callback, *made, state=None):
        self.callback, (self.args, self.optimizer, self.scheduler) = callback, made or parts()
        self.state = state or TrainerState(is_world_process_zero=True)
        self.begin()

    def begin(self):
        given = self.args, self.state, TrainerControl()
        self.callback.on_train_begin(*given, optimizer=self.optimizer, lr_scheduler=self.scheduler)

    def log(self, entries, step=None):
        given = {"optimizer": self.optimizer, "lr_scheduler": self.scheduler}
        for entry in entries:
            self.state.global_step = entry["step"] if step is None else step
            logs = {name: value for name, value in entry.items() if name != "step"}
            self.callback.on_log(self.args, self.state, TrainerControl(), logs={"loss": 1.0, **logs}, **given)

    def fields(self):
        return {
            **{name: getattr(self.args, name) for name in FIELDS},
            "learning_rate": module._learning_rate_scale(self.scheduler),
        }

    def frozen(self):
        return copy.deepcopy([vars(self.args), self.optimizer.state_dict(), self.scheduler.state_dict()])


@pytest.mark.parametrize("training, sign", CHANGES)
def test_advice_alone_changes_nothing(training, sign, warnings):
    run = Run(PlannerMonitorCallback(), *parts(training=training))
    before = run.frozen()
    run.log(history(sign))
    assert run.frozen() == before and run.callback.applied == []
    assert len(warnings) == 1 and sign in warnings[0] and "Applied" not in warnings[0]


@pytest.mark.parametrize("training, sign", CHANGES)
def test_auto_applies_what_the_table_says(training, sign, warnings):
    run = Run(PlannerMonitorCallback(auto=True), *parts(training=training))
    before, rest = run.fields(), vars(run.args).copy()
    run.log(history(sign))
    after = run.fields()
    assert {name: after[name] for name in after if after[name] != before[name]} == pytest.approx(
        CHANGES[training, sign]
    )
    assert rest.keys() == vars(run.args).keys() and run.args.learning_rate == 0.1
    step = 60 if sign == SPIKE else 50
    told = [
        {"step": step, "sign": sign, "field": f, "old": before[f], "new": after[f]} for f in CHANGES[training, sign]
    ]
    assert sorted(run.callback.applied, key=str) == sorted(told, key=str)
    assert len(warnings) == 1 and ("Applied" in warnings[0]) == bool(CHANGES[training, sign])


def test_cool_down_of_a_sign(warnings):
    run = Run(PlannerMonitorCallback(auto=True, cooldown=200))
    run.log(history(UNUSED, logs=100))  # steps 10 to 1000: told at 50, 250, 450, 650, 850
    steps = sorted({change["step"] for change in run.callback.applied})
    assert steps == [50, 250, 450, 650, 850] and len(warnings) == 5
    assert run.args.word_dropout == pytest.approx(0.5) and run.args.z_dropout == pytest.approx(0.05)
    run = Run(PlannerMonitorCallback(auto=True, cooldown=200), *parts(training="hard_em"))
    run.log(history(STALE, logs=100))
    assert run.fields()["learning_rate"] == pytest.approx(0.1)
    assert [c["new"] for c in run.callback.applied if c["field"] == "learning_rate"] == pytest.approx(
        [0.5, 0.25, 0.125, 0.1]  # and the bound
    )


def test_a_field_is_changed_once_per_cool_down(warnings):
    run = Run(PlannerMonitorCallback(auto=True, cooldown=200), *parts(training="hard_em"))
    both = {**ILL[UNUSED], **ILL[STALE], **ILL[BLURRED]}
    run.log(history(**both))
    assert len(warnings) == 3 and run.fields()["learning_rate"] == 0.5 and run.args.e_step_every == 2
    assert run.args.temperature == pytest.approx(0.7)
    settled = [{"em/flip_rate": 0.0} for _ in range(5)]
    run.log(settled, step=240)  # wants temperature up again
    assert len(warnings) == 4 and run.args.temperature == pytest.approx(0.7) and run.args.num_beams == 3
    spike = [{"monitor/planner_grad_norm": x} for x in (0.1, 0.1, 0.1, 0.1, 0.1, 5.0)]
    run.log(spike, step=241)  # and a lower rate
    assert len(warnings) == 5 and run.fields()["learning_rate"] == 0.5 and "Applied" not in warnings[-1]


def test_fields_that_are_not_there_or_unset(warnings):
    args, *others = parts(temperature_end=0.3, temperature=0.2)
    del args.usage_weight, args.num_beams
    run = Run(PlannerMonitorCallback(auto=True, cooldown=10), args, *others)
    run.log(history(BLURRED)[:5])
    assert args.temperature_end == 0.15 and args.temperature == 0.2  # below its bound: not raised to it
    args.training = "hard_em"
    run.log(history(SETTLED), step=100)
    assert args.temperature == pytest.approx(0.3) and not hasattr(args, "num_beams")


def test_looking_around_takes_no_samples_away(warnings):
    run = Run(PlannerMonitorCallback(auto=True, cooldown=10), *parts(training="hard_em"))
    run.log(history(SETTLED, logs=90))
    made = {field: [x["new"] for x in run.callback.applied if x["field"] == field] for field in FIELDS}
    assert made["num_beams"] == [3, 5, 7, 8] and made["num_candidates"] == [5, 7, 9, 11, 13, 15, 16]
    assert made["forced_share"] == pytest.approx([0.1, 0.2, 0.3]) and made["usage_weight"] == []


def test_other_logs_say_nothing(warnings):
    run = Run(PlannerMonitorCallback())
    run.log([{"eval_monitor/cos": 0.1, "step": i} for i in range(20)])
    assert run.callback.history == [] and warnings == []
    run.log(history(logs=700))
    assert len(run.callback.history) == module.REMEMBERED


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_learning_rate_stays_scaled(schedule, wrapped):
    (_, optimizer, scheduler), (_, plain, plain_scheduler) = parts(schedule), parts(schedule)
    given = SimpleNamespace(scheduler=scheduler) if wrapped else scheduler
    for step in range(40):
        for each, its in ((optimizer, scheduler), (plain, plain_scheduler)):
            each.step()
            its.step()
        if step in (3, 20):
            scale_learning_rate(optimizer, given, 0.5)
        scale = 0.5 ** ((step >= 3) + (step >= 20))
        rates = [group["lr"] * scale for group in plain.param_groups]
        assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(rates, rel=1e-12)
        assert scheduler.get_last_lr() == pytest.approx(rates, rel=1e-12)
    assert [group["initial_lr"] for group in optimizer.param_groups] == [0.1, 0.3]


def test_a_learning_rate_without_a_schedule_of_its_own_stays_scaled():
    _, optimizer, _ = parts()
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    before = [group["lr"] for group in optimizer.param_groups]
    scale_learning_rate(optimizer, scheduler, 0.5)
    scheduler.step(1.0)
    assert [group["lr"] for group in optimizer.param_groups] == [rate * 0.5 for rate in before]


def test_bad_settings():
    for bad in ({"every": 0}, {"cooldown": 0}):
        with pytest.raises(ValueError, match="at least 1 step"):
            PlannerMonitorCallback(**bad)


def test_rank_0_decides(monkeypatch, warnings):
    """The other process has logs in which there is no sign, and hears of it."""
    sent = []
    monkeypatch.setattr(module, "broadcast_object_list", lambda x: sent.append(copy.deepcopy(x)) or x)
    first = Run(PlannerMonitorCallback(auto=True), *parts(world_size=2))
    first.log(history(UNUSED))
    monkeypatch.setattr(module, "broadcast_object_list", lambda _: sent.pop(0))
    state = TrainerState(is_world_process_zero=False)
    second = Run(PlannerMonitorCallback(auto=True), *parts(world_size=2), state=state)
    second.log(history())
    assert second.fields() == first.fields() and second.callback.applied == first.callback.applied != []
    assert len(warnings) == 1 and sent == []
    monkeypatch.setattr(module, "broadcast_object_list", lambda _: pytest.fail("advice needs nobody else"))
    Run(PlannerMonitorCallback(), *parts(world_size=2)).log(history())


# -- the callback in a trainer ------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, labels=None):
        return {"loss": ((self.layer(self.dropout(x)) - labels) ** 2).mean()}


class Watched(SafeCheckpointMixin, Trainer):
    """As the planner's trainer does: a callback that knows it, a probe, metrics that come out with the next log."""

    def __init__(self, *given, monitor=None, **keywords):
        super().__init__(*given, **keywords)
        self._metrics = {"train": defaultdict(list)}
        self.probed, self.rates, self.loaders = [], [], set()
        if monitor is not None:
            monitor.trainer = self
            self.add_callback(monitor)

    def probe(self, batch):
        self.probed.append(batch["x"].clone())
        random.random(), torch.randn(3)
        batch.clear()
        return {"delta_nll_null": 0.0, "monitor/cos": 0.9}

    def log(self, logs, *others):
        logs.update({name: sum(x) / len(x) for name, x in self._metrics["train"].items()})
        self._metrics["train"].clear()
        super().log(logs, *others)

    def training_step(self, *given, **keywords):
        self.loaders.add(id(self.accelerator.gradient_state.active_dataloader))
        self.rates.append(self.optimizer.param_groups[0]["lr"])
        return super().training_step(*given, **keywords)


class Stock(Watched):
    """With transformers' own checkpoints."""

    def train(self, *given, **keywords):
        return Trainer.train(self, *given, **keywords)

    _save_optimizer_and_scheduler = Trainer._save_optimizer_and_scheduler
    _load_optimizer_and_scheduler = Trainer._load_optimizer_and_scheduler
    _save_rng_state = Trainer._save_rng_state
    _load_rng_state = Trainer._load_rng_state
    _save = Trainer._save


ROWS = [
    {"x": torch.randn(3, generator=torch.Generator().manual_seed(i)), "labels": torch.ones(1) * (i % 3)}
    for i in range(24)
]


def made(folder, monitor=None, kind=Watched, held_out=None, **changes):
    torch.manual_seed(0)
    args = TrainingArguments(
        str(folder),
        **{
            "max_steps": 16,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_steps": 8,
            "report_to": "none",
            "use_cpu": True,
            "disable_tqdm": True,
            "learning_rate": 0.01,
            "per_device_eval_batch_size": 3,
            "dataloader_pin_memory": False,
            **changes,
        },
    )
    for name, value in {**FIELDS, "training": "soft"}.items():
        setattr(args, name, value)
    return kind(Net(), args, train_dataset=ROWS, eval_dataset=held_out, monitor=monitor)


def watching(auto=True, every=1, cooldown=4, **changes):
    return PlannerMonitorCallback(auto, every, cooldown, **changes)


@pytest.mark.parametrize("held_out", [None, ROWS[5:12], {"one": ROWS[7:], "other": ROWS[:2]}])
def test_probes(tmp_path, held_out):
    monitor = watching(auto=False, every=4)
    trainer = made(tmp_path, monitor, held_out=held_out, logging_steps=2, save_strategy="no")
    trainer.train()
    rows = ROWS if held_out is None else held_out["one"] if isinstance(held_out, dict) else held_out
    wanted = torch.stack([row["x"] for row in rows[:3]])
    assert len(trainer.probed) == 4 and all(torch.equal(x, wanted) for x in trainer.probed)
    logged = [entry for entry in trainer.state.log_history if "monitor/cos" in entry]
    assert [entry["step"] for entry in logged] == [4, 8, 12, 16] and all("loss" in entry for entry in logged)
    assert all(entry["monitor/cos"] == 0.9 and entry["monitor/delta_nll_null"] == 0 for entry in logged)
    assert [entry["step"] for entry in monitor.history] == [4, 8, 12, 16]


def test_watching_does_not_change_training(tmp_path):
    weights = []
    for monitor in (None, watching(auto=False)):
        trainer = made(tmp_path, monitor, save_strategy="no", num_train_epochs=3, max_steps=-1)
        trainer.train()
        losses = [entry.get("loss") for entry in trainer.state.log_history]
        weights.append((trainer.model.layer.weight.tolist(), losses, trainer.state.global_step, trainer.state.epoch))
        assert len(trainer.loaders) == 1
    assert weights[0] == weights[1] and weights[0][2] == 36


def test_without_a_trainer_there_are_no_probes(tmp_path):
    monitor = watching()
    trainer = made(tmp_path, monitor, save_strategy="no")
    monitor.trainer = None
    trainer.train()
    assert trainer.probed == [] and monitor.history == []


def told(trainer):
    return {name: getattr(trainer.args, name) for name in FIELDS}


@pytest.mark.parametrize("kind", [Watched, Stock])
@pytest.mark.parametrize("restored", [False, True])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path, kind, restored, warnings):
    """Changes at 5, 9, 13; a checkpoint at 8, in which the second cool-down is one step from its end."""
    whole = made(tmp_path / "whole", watching(), kind)
    whole.train()
    monitor = whole.callback_handler.callbacks[-1]
    assert sorted({change["step"] for change in monitor.applied}) == [5, 9, 13] and len(warnings) == 3

    half = made(tmp_path / "half", watching(), kind, restore_callback_states_from_checkpoint=restored)
    _stop(half, 8)
    assert told(half) != FIELDS
    warnings.clear()
    monitor = watching()
    rest = made(tmp_path / "half", monitor, kind, restore_callback_states_from_checkpoint=restored)
    if restored:
        _keep_the_trainer(rest)
    assert told(rest) == FIELDS
    rest.train(resume_from_checkpoint=str(tmp_path / "half" / "checkpoint-8"))
    after = next(x for x in rest.callback_handler.callbacks if isinstance(x, PlannerMonitorCallback))
    assert (after is monitor) != restored and len(warnings) == 2
    assert after.state() == whole.callback_handler.callbacks[-1].state()
    assert after.history == whole.callback_handler.callbacks[-1].history
    assert told(rest) == told(whole) and rest.rates == pytest.approx(whole.rates[8:], rel=1e-12)
    assert rest.rates[-1] < 0.2 * 0.01
    assert torch.equal(rest.model.layer.weight, whole.model.layer.weight)


def _stop(trainer, step):
    """Train up to a step, with the schedule of the whole run."""
    on_step_end = trainer.callback_handler.on_step_end

    def stop(args, state, control):
        control = on_step_end(args, state, control)
        control.should_training_stop |= state.global_step == step
        return control

    trainer.callback_handler.on_step_end = stop
    trainer.train()


def _keep_the_trainer(trainer):
    load = trainer._load_callback_state

    def loaded():
        load()
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, PlannerMonitorCallback):
                callback.trainer = trainer

    trainer._load_callback_state = loaded


def test_what_is_configured_otherwise_on_resume_stays(tmp_path, warnings):
    _stop(made(tmp_path, watching()), 8)
    rest = made(tmp_path, watching(cooldown=100))
    rest.args.word_dropout = 0.33
    rest.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert rest.args.word_dropout == 0.33 and rest.args.z_dropout == 0.05
    unchanged = made(tmp_path, watching(auto=False, cooldown=100))
    unchanged.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert told(unchanged) == FIELDS and unchanged.callback_handler.callbacks[-1].applied != []


def test_resumed_in_the_same_process(tmp_path, warnings):
    trainer = made(tmp_path, watching(cooldown=100))
    trainer.train()
    fields, rates = told(trainer), trainer.rates[:]
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert told(trainer) == fields and trainer.rates[16:] == pytest.approx(rates[8:], rel=1e-12)


def test_a_checkpoint_from_before_there_was_a_callback(tmp_path, warnings):
    _stop(made(tmp_path), 8)
    monitor = watching()
    made(tmp_path, monitor).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert {change["step"] for change in monitor.applied} == {13}
    saved = json.loads((tmp_path / "checkpoint-16" / "trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["PlannerMonitorCallback"] == json.loads(json.dumps(monitor.state()))


def test_state_is_json_and_comes_back(warnings):
    run = Run(PlannerMonitorCallback(True, 7, 30, Thresholds(cos=0.7)))
    run.log(history(UNUSED))
    state = json.loads(json.dumps(run.callback.state()))
    back = PlannerMonitorCallback.from_state(state)
    assert back.state() == run.callback.state() and back.thresholds == Thresholds(cos=0.7) and back.auto
    assert back.applied == run.callback.applied != [] and back.last_warned == {UNUSED: 50}


def test_a_new_run_begins_anew(warnings):
    run = Run(PlannerMonitorCallback())
    run.log(history(UNUSED))
    run.state = TrainerState(stateful_callbacks=[run.callback], is_world_process_zero=True)
    run.begin()
    assert run.callback.history == [] and run.callback.last_warned == {}
    run.log(history(UNUSED))
    assert len(warnings) == 2


def test_warnings_go_through_transformers_logger(caplog):
    assert module.logger.name == "trl_ext.planner.monitor_callback" and hf_logging.get_logger("trl_ext") is not None
    with caplog.at_level(logging.WARNING, logger=module.logger.name):
        module.logger.addHandler(caplog.handler)
        Run(PlannerMonitorCallback()).log(history(UNUSED))
        module.logger.removeHandler(caplog.handler)
    assert UNUSED in caplog.text and "word_dropout +0.1, at most 0.5" in caplog.text and "larger quota" in caplog.text
