"""A callback that finds signs in a run's logs, warns about them, and can act on them."""

from dataclasses import asdict
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from .diagnostics import LEARNING_RATE, THRESHOLDS, WATCHED, Advice, History, Thresholds, advise


logger = logging.get_logger(__name__)

REMEMBERED = 512  # logs with watched values; many, because E-steps are rare
UNSET = {"temperature_end": "temperature"}  # None: equal to the other field


class PlannerMonitorCallback(TrainerCallback, ExportableState):
    """Run the trainer's `probe` regularly, read the logs, and warn of signs. With `auto`, act on them. Ours.

    Settings that it may change must be read from `args` at every step; its advice is for `args.training`. A field is
    changed at most once per cool-down, by the first sign in the table. Across processes, rank 0 decides. A resumed run
    keeps the changes made, except for fields whose configured value has changed.

    Args:
        auto: apply the actions.
        every: number of steps between probes. The values of a probe are averaged into the next regular log.
        cooldown: number of steps for which a sign is neither reported nor acted on again.
        thresholds: when a value becomes a sign.

    Attributes:
        trainer: set by the trainer, also after `_load_callback_state`, which may create a new callback. It has
            `probe(batch) -> dict[str, float]`, called in every process with the first held-out rows or else the first
            training rows; the random state is restored afterwards. None: no probes.
        applied: the changes made, dicts of step, sign, field, old, new.

    Raises:
        ValueError: `every` or `cooldown` is below 1.
    """

    def __init__(
        self,
        auto: bool = False,
        every: int = 50,
        cooldown: int = 200,
        thresholds: Thresholds | dict[str, Any] = THRESHOLDS,
    ):
        if every < 1 or cooldown < 1:
            raise ValueError(f"every={every}, cooldown={cooldown}: both must be at least 1 step")
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
        """The state for trainer_state.json, without the history, whose values are in its `log_history`."""
        given = {"auto": self.auto, "every": self.every, "cooldown": self.cooldown}
        return {
            "args": {**given, "thresholds": asdict(self.thresholds)},
            "attributes": {"last_warned": dict(self.last_warned), "applied": [dict(change) for change in self.applied]},
        }

    def on_train_begin(self, args, state, control, optimizer=None, lr_scheduler=None, **_):
        # Restore the state: transformers does so only under `restore_callback_states_from_checkpoint`
        self._forget()
        # A checkpoint written without this callback has no entry for it, but saving needs one
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
            if field == LEARNING_RATE:  # the saved scheduler may include it
                scale_learning_rate(optimizer, scheduler, values[-1] / _learning_rate_scale(scheduler))
            elif getattr(args, field, None) == values[0]:
                setattr(args, field, values[-1])

    # -- probes -----------------------------------------------------------------------------------------------------

    def on_step_end(self, args, state, control, **_):
        if self.trainer is None or state.global_step % self.every:
            return
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):  # keep the random state of the training
            if self._batch is None:
                self._batch = self._first_batch()
            found = self.trainer.probe(dict(self._batch))
        logged = self.trainer._metrics["train"]  # not `log`: it would replace the step's own log
        for name, value in found.items():
            logged[f"monitor/{name.removeprefix('monitor/')}"].append(value)

    def _first_batch(self) -> dict[str, Any]:
        trainer = self.trainer
        rows = trainer.eval_dataset or trainer.train_dataset
        rows = next(iter(rows.values())) if isinstance(rows, dict) else rows
        size = max(2, trainer.args.eval_batch_size)  # a shuffled plan needs another row
        loader = trainer._get_dataloader(rows, "Monitor", size, trainer._get_eval_sampler)
        # Not accelerate's wrapper: it would stay the active loader, in training too, until it is exhausted
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
        if self.auto and args.world_size > 1:  # otherwise processes could use different settings
            due = broadcast_object_list([due])[0]
        for advice in due:
            self.last_warned[advice.sign] = step
            changes = self._act(advice, step, args, optimizer, lr_scheduler) if self.auto else []
            if state.is_world_process_zero:
                done = [f"{x['field']} {x['old']} -> {x['new']}" for x in changes]
                logger.warning(f"step {step}: {advice}" + (f". Applied: {', '.join(done)}" if done else ""))

    def _remember(self, logs: dict[str, float], step: int) -> bool:
        """Keep the watched values of a log. Returns whether there were any."""
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


_SCALE = "learning_rate_scale"  # an attribute of the scheduler, so that it is saved together with the rates


def _torch_scheduler(scheduler: Any) -> Any:
    return getattr(scheduler, "scheduler", scheduler)  # unwrapped from accelerate


def _learning_rate_scale(scheduler: Any) -> float:
    return getattr(_torch_scheduler(scheduler), _SCALE, 1.0)


def scale_learning_rate(optimizer: Any, scheduler: Any, factor: float) -> None:
    """Multiply the learning rate of all parameter groups, from the next step on.

    LambdaLR, which transformers uses for its schedules, sets lr = base_lr * lambda(step) at each step, so `base_lrs` is
    changed too. Other schedulers continue from the current rate. `initial_lr` is not changed: the next scheduler starts
    from it.
    """
    scheduler = _torch_scheduler(scheduler)
    for group in optimizer.param_groups:
        group["lr"] *= factor
    for name in {"base_lrs", "_last_lr"} & vars(scheduler).keys():
        setattr(scheduler, name, [rate * factor for rate in getattr(scheduler, name)])
    setattr(scheduler, _SCALE, _learning_rate_scale(scheduler) * factor)
