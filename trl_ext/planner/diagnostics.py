"""A table of signs in the monitors' values, and advice for each sign.

A history is a list of dicts, oldest first, of values logged under the names below, each with its `step`. A dict may
hold only some of them. A level is the mean of the last `window` values of a name. With fewer values there is no level.

    em/margin                       nats between the best candidate and the second
    em/flip_rate                    share of plans that changed
    em/staleness                    nats between the best candidate and the cached plan
    monitor/delta_nll_null          cost of the null plan, nats per token; ..._shuffled: cost of another text's plan
    monitor/commonest_plan          share of texts that have the most common plan
    monitor/entropy_<type>          entropy of the type's predictions, nats
    monitor/max_prob_<type>         their largest probability
    monitor/cos, monitor/l2         between expected and chosen codeword
    monitor/planner_grad_norm       norm of the gradient, of any scale: at the plans' embeddings (soft) or at the
                                    planner's logits (hard_em)
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass


History = list[dict[str, float]]

WATCHED = (
    "em/margin",
    "em/flip_rate",
    "em/staleness",
    "monitor/delta_nll_null",
    "monitor/delta_nll_shuffled",
    "monitor/commonest_plan",
    "monitor/entropy_",
    "monitor/max_prob_",
    "monitor/cos",
    "monitor/l2",
    "monitor/planner_grad_norm",
)
LEARNING_RATE = "learning_rate"
WHOLE = ("num_candidates", "e_step_every", "num_beams")


@dataclass(frozen=True)
class Thresholds:
    """Thresholds at which a value becomes a sign.

    Attributes:
        window: number of values in a level.
        delta_nll: nats, per text or per token as logged; below it, plans are not used.
        commonest: if a larger share of texts has the same plan, the plan says nothing about a text.
        margin: nats; below it, candidates are equally good.
        flips_high: with a small margin, plans alternate if a larger share of them changes.
        flips_low, early, entropy, max_prob: the planner has settled too early if fewer plans than `flips_low` change,
            up to step `early`, and some type has an entropy below `entropy` (nats) and a largest probability above
            `max_prob`.
        staleness: nats; above it, plans are out of date.
        cos: if all values of a window are below, the executor is trained on embeddings that it will not see later.
        gradient_zero: if all norms are at most this, no gradient reaches the planner.
        gradient_spike: a norm that is this many times the median of the `window` norms before it.
    """

    window: int = 5
    delta_nll: float = 0.05
    commonest: float = 0.5
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


THRESHOLDS = Thresholds()


@dataclass(frozen=True)
class Action:
    """A change of a setting: value * factor + delta, kept between `low` and `high`. A value beyond them is not changed.

    Attributes:
        field: a field of the trainer's configuration, or "learning_rate": a multiple of the configured rate for all
            groups.
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
        name: name of the sign.
        condition: returns the values that show the sign, by name; empty if the sign is absent.
        soft, hard_em: for each training, what can be changed during a run (an `Action`), and in words what cannot.
            Empty if the sign cannot occur.
    """

    name: str
    condition: Callable[[History, Thresholds], dict[str, float]]
    soft: tuple[Action | str, ...]
    hard_em: tuple[Action | str, ...]


@dataclass(frozen=True)
class Advice:
    """A sign that is present, the values that show it, and what to do."""

    sign: str
    seen: dict[str, float]
    actions: tuple[Action | str, ...]

    def __str__(self) -> str:
        seen = ", ".join(f"{name}={value:.3g}" for name, value in self.seen.items())
        return f"{self.sign} ({seen}): " + "; ".join(str(action) for action in self.actions)


# -- conditions ---------------------------------------------------------------------------------------------------------


def _last(history: History, name: str, count: int) -> list[float]:
    """The last values of a name, oldest first; empty if there are fewer than `count`. NaN values are skipped."""
    found = []
    for entry in reversed(history):
        value = entry.get(name, math.nan)
        if not math.isnan(value):
            found.append(value)
            if len(found) == count:
                return found[::-1]
    return []


def _level(history: History, name: str, thresholds: Thresholds) -> float:
    """The mean of the last values of a name; NaN, which is neither above nor below anything, if there are too few."""
    values = _last(history, name, thresholds.window)
    return statistics.fmean(values) if values else math.nan


def _one_plan_for_all(history: History, t: Thresholds) -> dict[str, float]:
    gap, share = (_level(history, name, t) for name in ("monitor/delta_nll_shuffled", "monitor/commonest_plan"))
    alike = gap < t.delta_nll and share > t.commonest
    return {"monitor/delta_nll_shuffled": gap, "monitor/commonest_plan": share} if alike else {}


def _plan_unused(history: History, t: Thresholds) -> dict[str, float]:
    """Texts are as likely without their plan, or with another text's plan.

    If all texts have the same plan, another text's plan is the own plan as well. Then the planner is the cause.
    """
    names = ["monitor/delta_nll_null"] + ([] if _one_plan_for_all(history, t) else ["monitor/delta_nll_shuffled"])
    gaps = {name: _level(history, name, t) for name in names}
    return {name: gap for name, gap in gaps.items() if gap < t.delta_nll}


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
_MORE = Action("num_candidates", delta=2, high=16)
_OPENER = Action("entropy_weight", delta=0.05, high=0.5)
# The learning rate is not lowered: a slower executor returns to its plan more slowly (docs/log.md)
_USE_THE_PLAN = (
    Action("word_dropout", delta=0.1, high=0.5),
    Action("z_dropout", delta=0.05, high=0.05),  # trains the null plan; a higher share teaches to write without a plan
    "in a new run, a larger quota or codebook",
)
# Temperature and beams determine an E-step's candidates; beams are added to the samples
_LOOK_AROUND = (
    _HOTTER,
    _OPENER,
    Action("num_beams", delta=2, high=8),
    Action("beam_diversity", delta=2.0, high=8.0),
    _MORE,
    Action("forced_share", delta=0.1, high=0.3),
)

SIGNS: tuple[Sign, ...] = (
    Sign(
        "the planner writes one plan for all texts",
        _one_plan_for_all,
        soft=(Action("usage_weight", delta=0.1, high=1.0), _OPENER),
        hard_em=_LOOK_AROUND,
    ),
    Sign("the executor does not use its plan", _plan_unused, soft=_USE_THE_PLAN, hard_em=_USE_THE_PLAN),
    Sign(
        "candidates are as good as one another and plans keep changing",
        _undecided,
        soft=(),
        hard_em=(_MORE, _OFTENER, _SLOWER),
    ),
    Sign("the planner settled early", _settled_early, soft=(), hard_em=_LOOK_AROUND),
    Sign("cached plans are out of date", _stale, soft=(), hard_em=(_OFTENER, _SLOWER)),
    Sign(
        "expected codewords stay far from chosen ones",
        _blurred,
        soft=(Action("temperature_end", factor=0.5, low=0.1), Action("temperature", factor=0.7, low=0.3)),
        hard_em=(
            Action("planner_weight", factor=1.5, high=4.0),
            Action("entropy_weight", delta=-0.1, low=0.0),
            Action("temperature_end", factor=0.5, low=0.1),
            Action("temperature", factor=0.7, low=0.3),
        ),
    ),
    Sign(
        "no gradient reaches the planner",
        _no_gradient,
        soft=(
            "check that nothing detaches the soft embeddings",
            "check the mask of <EOS>: it may close every slot",
        ),
        hard_em=(
            "check that planner_weight is not 0 and that nothing detaches the planner's logits",
            "check the mask of <EOS>: it may close every slot",
        ),
    ),
    # Not the temperature in hard_em: a higher one finds plans that the planner predicts less well
    Sign("the planner's gradient spikes", _gradient_spike, soft=(_HOTTER, _SLOWER), hard_em=(_SLOWER,)),
)


def advise(history: History, thresholds: Thresholds = THRESHOLDS, training: str = "soft") -> list[Advice]:
    """The signs in a history, in the order of the table, with what to do about each. Ours.

    Args:
        history: logged values with their `step`, oldest first, as in `trainer.state.log_history`.
        thresholds: when a value becomes a sign.
        training: `"soft"` or `"hard_em"`.

    Returns:
        One `Advice` for each sign that is present.
    """
    seen = [(sign, sign.condition(history, thresholds)) for sign in SIGNS if getattr(sign, training)]
    return [Advice(sign.name, found, getattr(sign, training)) for sign, found in seen if found]
