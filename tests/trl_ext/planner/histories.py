"""Made-up histories of the monitors, healthy and with one sign each, and what is done about it."""

from trl_ext.planner.diagnostics import SIGNS


HEALTHY = {
    "monitor/delta_nll_null": 0.8,
    "monitor/delta_nll_shuffled": 1.2,
    "monitor/commonest_plan": 0.1,
    "em/margin": 2.0,
    "em/flip_rate": 0.1,
    "em/staleness": 0.2,
    "monitor/entropy_a": 1.5,
    "monitor/max_prob_a": 0.4,
    "monitor/entropy_b": 0.1,
    "monitor/max_prob_b": 0.99,
    "monitor/cos": 0.8,
    "monitor/l2": 0.3,
    "monitor/planner_grad_norm": 0.05,
}
ONE_FOR_ALL, UNUSED, UNDECIDED, SETTLED, STALE, BLURRED, DEAD, SPIKE = (sign.name for sign in SIGNS)
ILL = {
    ONE_FOR_ALL: {"monitor/delta_nll_shuffled": 0.0, "monitor/commonest_plan": 1.0, "monitor/delta_nll_null": 0.17},
    UNUSED: {"monitor/delta_nll_null": 0.01},
    UNDECIDED: {"em/margin": 0.02, "em/flip_rate": 0.6},
    SETTLED: {"em/flip_rate": 0.0},  # type b is certain
    STALE: {"em/staleness": 3.0},
    BLURRED: {"monitor/cos": 0.2},
    DEAD: {"monitor/planner_grad_norm": 0.0},
}
FIELDS = {
    "word_dropout": 0.0,
    "z_dropout": 0.0,
    "num_candidates": 3,
    "e_step_every": 5,
    "temperature": 1.0,
    "temperature_end": None,
    "usage_weight": 0.0,
    "num_beams": 1,
    "entropy_weight": 0.0,
    "beam_diversity": 0.0,
    "forced_share": 0.0,
    "planner_weight": 1.0,
}
# What the table does to those, by the first application
_UNUSED = {"word_dropout": 0.1, "z_dropout": 0.05}
_LOOK_AROUND = {
    "temperature": 1.5,
    "entropy_weight": 0.05,
    "num_beams": 3,
    "beam_diversity": 2.0,
    "num_candidates": 5,
    "forced_share": 0.1,
}
CHANGES = {
    ("soft", ONE_FOR_ALL): {"usage_weight": 0.1, "entropy_weight": 0.05},
    ("soft", UNUSED): _UNUSED,
    ("soft", BLURRED): {"temperature_end": 0.5, "temperature": 0.7},
    ("soft", DEAD): {},
    ("soft", SPIKE): {"temperature": 1.5, "learning_rate": 0.5},
    ("hard_em", ONE_FOR_ALL): _LOOK_AROUND,
    ("hard_em", UNUSED): _UNUSED,
    ("hard_em", UNDECIDED): {"num_candidates": 5, "e_step_every": 2, "learning_rate": 0.5},
    ("hard_em", SETTLED): _LOOK_AROUND,
    ("hard_em", STALE): {"e_step_every": 2, "learning_rate": 0.5},
    ("hard_em", BLURRED): {"planner_weight": 1.5, "temperature_end": 0.5, "temperature": 0.7},
    ("hard_em", DEAD): {},
    ("hard_em", SPIKE): {"learning_rate": 0.5},
}


def history(sign=None, logs=6, **changes):
    found = [{**HEALTHY, **ILL.get(sign, {}), **changes, "step": 10 * (i + 1)} for i in range(logs)]
    if sign == SPIKE:
        found[-1]["monitor/planner_grad_norm"] = 3.0
    return found
