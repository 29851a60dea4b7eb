"""What the monitors' values are a sign of, and what to do about it: a table, and a callback that reads it.

A history is a list of dicts, oldest first, of what was logged under these names, each with its `step`; a dict has some of
them. A level is the mean of the last `window` values under a name; as long as there are fewer, there is no sign.

    em/margin                   nats between the best candidate and the second
    em/flip_rate                share of plans that changed
    em/staleness                nats between the best candidate and the cached plan
    monitor/delta_nll_null      nats that the null plan costs
    monitor/entropy_<type>      nats, of the type's predictions; monitor/max_prob_<type> beside it
    monitor/cos, monitor/l2     between expected and chosen codeword
    monitor/planner_grad_norm   of any scale, such as all since the last log
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from transformers.utils import logging


logger = logging.get_logger(__name__)

History = list[dict[str, float]]

WATCHED = (
    "em/margin", "em/flip_rate", "em/staleness", "monitor/delta_nll_null", "monitor/entropy_", "monitor/max_prob_",
    "monitor/cos", "monitor/l2", "monitor/planner_grad_norm",
)  # fmt: skip
REMEMBERED = 512  # logs with watched values; E-steps are far between
LEARNING_RATE = "learning_rate"
WHOLE = ("num_candidates", "e_step_every", "num_beams")
UNSET = {"temperature_end": "temperature"}  # None: it stays what the other one is
AT_MOST = {"num_beams": "num_candidates"}


@dataclass(frozen=True)
class Thresholds:
    """Where a value becomes a sign.

    Attributes:
        window: values in a level.
        delta_nll: nats, per text or per token as logged; below, plans are not used.
        margin: nats; below, candidates are as good as one another ...
        flips_high: ... and above this share of plans changed they take turns.
        flips_low, early, entropy, max_prob: below this share, up to this step, with a type below these nats and above this
            probability, the planner has settled before it has looked around.
        staleness: nats; above, plans are out of date.
        cos: if all values of a window are below, the executor learns on embeddings it will not see.
        gradient_zero: if all are at most this, no gradient reaches the planner.
        gradient_spike: a norm that is so many times the median of the `window` before it.
    """

    window: int = 5
    delta_nll: float = 0.05
    margin: float = 0.1
    flips_high: float = 0.3
    flips_low: float = 0.02
    early: int = 1000
    entropy: float = 0.3
    max_prob: float = 0.9
    staleness: float = 1.0
    cos: float = 0.5
    gradient_zero: float = 1e-8
    gradient_spike: float = 10.0


@dataclass(frozen=True)
class Action:
    """value * factor + delta, kept between `low` and `high`; a value that is beyond them stays.

    Attributes:
        field: of the trainer's config, or "learning_rate": of all parameter groups, as a multiple of what is configured.
    """

    field: str
    factor: float = 1.0
    delta: float = 0.0
    low: float = -math.inf
    high: float = math.inf

    def __call__(self, value: float) -> float:
        new = value * self.factor + self.delta
        new = min(new, max(self.high, value)) if new > value else max(new, min(self.low, value))
        return round(new) if self.field in WHOLE else new

    def __str__(self) -> str:
        change = f"x {self.factor:g}" if self.factor != 1 else f"{self.delta:+g}"
        bounds = [f"at {word} {x:g}" for word, x in (("least", self.low), ("most", self.high)) if math.isfinite(x)]
        return ", ".join([f"{self.field} {change}", *bounds])


@dataclass(frozen=True)
class Sign:
    """A row of the table.

    Attributes:
        condition: what it saw in a history, by name; empty where the sign is not there.
        actions: what can be changed while training, and, in words, what cannot.
    """

    name: str
    condition: Callable[[History, Thresholds], dict[str, float]]
    actions: tuple[Action | str, ...]


@dataclass(frozen=True)
class Advice:
    """A sign that is there, by name, what was seen of it, and what to do."""

    sign: str
    seen: dict[str, float]
    actions: tuple[Action | str, ...]

    def __str__(self) -> str:
        seen = ", ".join(f"{name}={value:.3g}" for name, value in self.seen.items())
        return f"{self.sign} ({seen}): " + "; ".join(str(action) for action in self.actions)


# -- conditions ---------------------------------------------------------------------------------------------------------


def _last(history: History, name: str, count: int) -> list[float]:
    """The last values under a name, oldest first; none if there are fewer than `count`. NaN says nothing."""
    found = []
    for entry in reversed(history):
        value = entry.get(name, math.nan)
        if not math.isnan(value):
            found.append(value)
            if len(found) == count:
                return found[::-1]
    return []


def _level(history: History, name: str, thresholds: Thresholds) -> float:
    """NaN, which is neither above nor below anything, if there is none."""
    values = _last(history, name, thresholds.window)
    return statistics.fmean(values) if values else math.nan


def _plan_unused(history: History, t: Thresholds) -> dict[str, float]:
    gap = _level(history, "monitor/delta_nll_null", t)
    return {"monitor/delta_nll_null": gap} if gap < t.delta_nll else {}


def _undecided(history: History, t: Thresholds) -> dict[str, float]:
    margin, flips = _level(history, "em/margin", t), _level(history, "em/flip_rate", t)
    return {"em/margin": margin, "em/flip_rate": flips} if margin < t.margin and flips > t.flips_high else {}


def _settled_early(history: History, t: Thresholds) -> dict[str, float]:
    flips = _level(history, "em/flip_rate", t)
    if not flips < t.flips_low or history[-1]["step"] > t.early:
        return {}
    prefix = "monitor/entropy_"
    for name in sorted({name for entry in history for name in entry if name.startswith(prefix)}):
        peak = name.replace(prefix, "monitor/max_prob_")
        entropy, max_prob = _level(history, name, t), _level(history, peak, t)
        if entropy < t.entropy and max_prob > t.max_prob:
            return {"em/flip_rate": flips, name: entropy, peak: max_prob}
    return {}


def _stale(history: History, t: Thresholds) -> dict[str, float]:
    gap = _level(history, "em/staleness", t)
    return {"em/staleness": gap} if gap > t.staleness else {}


def _blurred(history: History, t: Thresholds) -> dict[str, float]:
    cos = _last(history, "monitor/cos", t.window)
    if not cos or max(cos) >= t.cos:
        return {}
    l2 = _last(history, "monitor/l2", 1)
    return {"monitor/cos": cos[-1], **({"monitor/l2": l2[-1]} if l2 else {})}


def _no_gradient(history: History, t: Thresholds) -> dict[str, float]:
    norms = _last(history, "monitor/planner_grad_norm", t.window)
    return {"monitor/planner_grad_norm": norms[-1]} if norms and max(norms) <= t.gradient_zero else {}


def _gradient_spike(history: History, t: Thresholds) -> dict[str, float]:
    norms = _last(history, "monitor/planner_grad_norm", t.window + 1)
    usual = statistics.median(norms[:-1]) if norms else 0.0
    if usual <= t.gradient_zero or norms[-1] <= t.gradient_spike * usual:
        return {}
    return {"monitor/planner_grad_norm": norms[-1], "median before": usual}


# -- the table ----------------------------------------------------------------------------------------------------------

_SLOWER = Action(LEARNING_RATE, factor=0.5, low=0.1)
_HOTTER = Action("temperature", factor=1.5, high=2.0)
_OFTENER = Action("e_step_every", factor=0.5, low=1)

SIGNS: tuple[Sign, ...] = (
    Sign(
        "the executor does not use its plan",
        _plan_unused,
        (
            Action("word_dropout", delta=0.1, high=0.5),
            Action("z_dropout", delta=0.05, high=0.3),
            _SLOWER,
            "in a new run, a larger quota or codebook",
        ),
    ),
    Sign(
        "candidates are as good as one another and plans keep changing",
        _undecided,
        (Action("num_candidates", delta=2, high=16), _OFTENER, _SLOWER),
    ),
    Sign(
        "the planner settled early",
        _settled_early,
        (
            _HOTTER,
            Action("usage_weight", delta=0.05, high=0.5),
            Action("num_beams", delta=2, high=8),
            "give the E-step random plans among its candidates",
        ),
    ),
    Sign("cached plans are out of date", _stale, (_OFTENER, _SLOWER)),
    Sign(
        "soft embeddings stay far from codewords",
        _blurred,
        (Action("temperature_end", factor=0.5, low=0.1), Action("temperature", factor=0.7, low=0.3)),
    ),
    Sign(
        "no gradient reaches the planner",
        _no_gradient,
        ("check that nothing detaches the soft embeddings", "check the mask of <EOS>: it may close every slot"),
    ),
    Sign("the planner's gradient spikes", _gradient_spike, (_HOTTER, _SLOWER)),
)


def advise(history: History, thresholds: Thresholds = Thresholds()) -> list[Advice]:
    """The signs that are in a history, in the order of the table."""
    seen = [(sign, sign.condition(history, thresholds)) for sign in SIGNS]
    return [Advice(sign.name, found, sign.actions) for sign, found in seen if found]


# -- the callback -------------------------------------------------------------------------------------------------------


class PlannerMonitorCallback(TrainerCallback, ExportableState):
    """Has the trainer's `probe` run now and then, reads the logs, and warns of signs; with `auto`, acts on them.

    What it may act on, `args` must say anew at every step. A field is changed once per cool-down, by the sign that comes
    first in the table. Across processes, rank 0 decides. A resumed run goes on with the changes made, except of fields
    that are configured otherwise than they were.

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
        thresholds: Thresholds | dict[str, float] = Thresholds(),
    ):
        if every < 1 or cooldown < 1:
            raise ValueError(f"every={every}, cooldown={cooldown}: at least 1 step")
        self.auto, self.every, self.cooldown = auto, every, cooldown
        self.thresholds = Thresholds(**thresholds) if isinstance(thresholds, dict) else thresholds
        self.trainer: Any = None
        self._batch: dict[str, Any] | None = None
        self._forget()

    def _forget(self) -> None:
        self.history: History = []
        self.told: dict[str, int] = {}  # step of each sign's last warning
        self.applied: list[dict[str, Any]] = []

    # -- state ------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """For trainer_state.json, without the history, whose values are in its `log_history`."""
        given = {"auto": self.auto, "every": self.every, "cooldown": self.cooldown}
        return {
            "args": {**given, "thresholds": asdict(self.thresholds)},
            "attributes": {"told": dict(self.told), "applied": [dict(change) for change in self.applied]},
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
        self.told, self.applied = dict(saved["attributes"]["told"]), list(saved["attributes"]["applied"])
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
        loader = trainer._get_dataloader(rows, "Monitor", trainer.args.eval_batch_size, trainer._get_eval_sampler)
        # Not accelerate's loader around it, which would be the active one, in training too, until it is exhausted
        return trainer._prepare_inputs(next(iter(loader.base_dataloader)))

    # -- advice -----------------------------------------------------------------------------------------------------

    def on_log(self, args, state, control, logs=None, optimizer=None, lr_scheduler=None, **_):
        step = state.global_step
        due = []
        if self._remember(logs or {}, step):
            due = [x for x in advise(self.history, self.thresholds) if self._over(step, self.told.get(x.sign))]
        if self.auto and args.world_size > 1:  # or processes would go on with different settings
            due = broadcast_object_list([due])[0]
        for advice in due:
            self.told[advice.sign] = step
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
            old = _learning_rate_scale(scheduler) if rate else getattr(args, action.field, None)
            value = getattr(args, UNSET.get(action.field, ""), None) if old is None else old
            if value is None:
                continue
            new = min(action(value), max(getattr(args, AT_MOST.get(action.field, ""), math.inf), value))
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
