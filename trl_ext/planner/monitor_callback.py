"""A callback that reads the signs in a run's logs, tells of them, and can act on them."""

from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .diagnostics import LEARNING_RATE, THRESHOLDS, WATCHED, Advice, History, Thresholds, advise


logger = logging.get_logger(__name__)

REMEMBERED = 512  # logs with watched values; E-steps are far between
UNSET = {"temperature_end": "temperature"}  # None: it stays what the other one is


class PlannerMonitorCallback(TrainerCallback, ExportableState):
    """Has the trainer's `probe` run now and then, reads the logs, and warns of signs; with `auto`, acts on them.

    What it may act on, `args` must say anew at every step; what it advises is for `args.training`. A field is changed once
    per cool-down, by the sign that comes first in the table. Across processes, rank 0 decides. A resumed run goes on with
    the changes made, except of fields that are configured otherwise than they were.

    Args:
        auto: apply the actions.
        every: steps between probes. A probe's values are averaged into the next regular log.
        cooldown: steps for which a sign is not told, nor acted on, again.

    Attributes:
        trainer: to be set by the trainer, also after `_load_callback_state`, which may make a new callback. Has
            `probe(batch) -> dict[str, float]`, called in every process, on the first held-out rows or else the first
            training rows; its random numbers are put back. None: no probes.
        applied: what was changed: dicts of step, sign, field, old, new.
    """

    def __init__(
        self,
        auto: bool = False,
        every: int = 50,
        cooldown: int = 200,
        thresholds: Thresholds | dict[str, Any] = THRESHOLDS,
    ):
        if every < 1 or cooldown < 1:
            raise ValueError(f"every={every}, cooldown={cooldown}: must be at least 1 step")
        self.auto, self.every, self.cooldown = auto, every, cooldown
        self.thresholds = Thresholds(**thresholds) if isinstance(thresholds, dict) else thresholds
        self.trainer: Any = None
        self._batch: dict[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self.history: History = []
        self.last_warned: dict[str, int] = {}  # step of each sign's last warning
        self.applied: list[dict[str, Any]] = []

    # -- state ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """For trainer_state.json, without the history, whose values are in its `log_history`."""
        given = {"auto": self.auto, "every": self.every, "cooldown": self.cooldown}
        return {
            "args": {**given, "thresholds": asdict(self.thresholds)},
            "attributes": {"last_warned": dict(self.last_warned), "applied": [dict(change) for change in self.applied]},
        }

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **_):
        """transformers reads saved states only under `restore_callback_states_from_checkpoint`, so it is done here."""
        self._forget()
        # A checkpoint from before there was a callback has no place for it, which saving needs
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        if state.global_step == 0:
            return
        for entry in state.log_history:
            self._remember(entry, entry["step"])
        attributes = saved["attributes"]
        self.last_warned = dict(
            attributes.get("last_warned") or attributes.get("told", {})
        )  # "told" in older checkpoints
        self.applied = list(attributes["applied"])
        if self.auto:
            self._apply_again(args, optimizer, lr_scheduler)

    def _apply_again(self, args: Any, optimizer: Any, scheduler: Any) -> None:
        changes: dict[str, list[Any]] = {}
        for change in self.applied:
            changes.setdefault(change["field"], [change["old"]]).append(change["new"])
        for field, values in changes.items():
            if field == LEARNING_RATE:  # the scheduler may have been saved with it
                scale_learning_rate(optimizer, scheduler, values[-1] / _learning_rate_scale(scheduler))
            elif getattr(args, field, None) == values[0]:
                setattr(args, field, values[-1])

    # -- probes -----------------------------------------------------------------------------------------------------

    def on_step_end(self, args, state, control, **_):
        if self.trainer is None or state.global_step % self.every:
            return
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):  # training goes on as if nobody had looked
            if self._batch is None:
                self._batch = self._first_batch()
            found = self.trainer.probe(dict(self._batch))
        logged = self.trainer._metrics["train"]  # not `log`, after which the step's own log would be left out
        for name, value in found.items():
            logged[f"monitor/{name.removeprefix('monitor/')}"].append(value)

    def _first_batch(self) -> dict[str, Any]:
        trainer = self.trainer
        rows = trainer.eval_dataset or trainer.train_dataset
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        size = max(2, trainer.args.eval_batch_size)  # alone, a text could be given no other's plan
        loader = trainer._get_dataloader(rows, "Monitor", size, trainer._get_eval_sampler)
        # Not accelerate's loader around it, which would be the active one, in training too, until it is exhausted
        return trainer._prepare_inputs(next(iter(loader.base_dataloader)))

    # -- advice -----------------------------------------------------------------------------------------------------

    def on_log(self, args, state, control, logs=None, optimizer=None, lr_scheduler=None, **_):
        step = state.global_step
        due = []
        if self._remember(logs or {}, step):
            due = [
                x
                for x in advise(self.history, self.thresholds, args.training)
                if self._over(step, self.last_warned.get(x.sign))
            ]
        if self.auto and args.world_size > 1:  # or processes would go on with different settings
            due = broadcast_object_list([due])[0]
        for advice in due:
            self.last_warned[advice.sign] = step
            changes = self._act(advice, step, args, optimizer, lr_scheduler) if self.auto else []
            if state.is_world_process_zero:
                done = [f"{x['field']} {x['old']} -> {x['new']}" for x in changes]
                logger.warning(f"step {step}: {advice}" + (f". Applied: {', '.join(done)}" if done else ""))

    def _remember(self, logs: dict[str, float], step: int) -> bool:
        """Whether there was anything to remember."""
        entry = {name: value for name, value in logs.items() if name.startswith(WATCHED)}
        if entry:
            self.history.append({**entry, "step": step})
            del self.history[:-REMEMBERED]
        return bool(entry)

    def _over(self, step: int, last: int | None) -> bool:
        return last is None or step - last >= self.cooldown

    def _act(self, advice: Advice, step: int, args: Any, optimizer: Any, scheduler: Any) -> list[dict[str, Any]]:
        changed = {change["field"] for change in self.applied if not self._over(step, change["step"])}
        made = []
        for action in advice.actions:
            if isinstance(action, str) or action.field in changed:
                continue
            rate = action.field == LEARNING_RATE
            old: Any = _learning_rate_scale(scheduler) if rate else getattr(args, action.field, None)
            value = getattr(args, UNSET.get(action.field, ""), None) if old is None else old
            if value is None:
                continue
            new = action(value)
            if new == value:
                continue
            if rate:
                scale_learning_rate(optimizer, scheduler, new / old)
            else:
                setattr(args, action.field, new)
            made.append({"step": step, "sign": advice.sign, "field": action.field, "old": old, "new": new})
        self.applied += made
        return made


_SCALE = "learning_rate_scale"  # an attribute of the scheduler's, so that it is saved with the rates that it is in


def _torch_scheduler(scheduler: Any) -> Any:
    return getattr(scheduler, "scheduler", scheduler)  # under accelerate's wrapper


def _learning_rate_scale(scheduler: Any) -> float:
    return getattr(_torch_scheduler(scheduler), _SCALE, 1.0)


def scale_learning_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiply the learning rate of all parameter groups, from the next step on.

    LambdaLR, as which transformers makes its schedules, sets lr = base_lr * lambda(step) at each step, so that base_lrs
    must change too. Others go on from the rate that they find. `initial_lr` stays: the next scheduler begins with it.
    """
    scheduler = _torch_scheduler(scheduler)
    for group in optimizer.param_groups:
        group["lr"] *= factor
    for name in {"base_lrs", "_last_lr"} & vars(scheduler).keys():
        setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
    setattr(scheduler, _SCALE, _learning_rate_scale(scheduler) * factor)
