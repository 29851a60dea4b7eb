"""What a run has learnt beside its weights: `planner_state.safetensors`, and what it must agree with in its JSON."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from unsloth_ext.planner.config import PlannerConfig

from ..common.saved_weights import CheckpointError, check_finite
from .config import PlannerExecutorConfig
from .curriculum import LengthCurriculum
from .em import EStepSchedule, PlanCache, number_of_plans
from .losses import UsageAverage
from .quota import PlannerQuotaController


TENSORS, SETTINGS = "planner_state.safetensors", "planner_state.json"


def new_state(args: PlannerExecutorConfig, config: PlannerConfig, rows: int) -> nn.ModuleDict:
    """Of a new run on so many training rows.

    Raises:
        ValueError: there are fewer plans than beams.
    """
    state = nn.ModuleDict({"usage": UsageAverage([kind.num_concepts for kind in config.types], args.usage_window)})
    targets = args.targets(config) if args.training == "soft" else None  # a plan that was found has no expectation
    if targets is not None:
        state["quota"] = PlannerQuotaController(targets, [kind.quota for kind in config.types], args.quota_rate)
    if args.length_curriculum is not None:
        state["curriculum"] = LengthCurriculum(
            args.length_curriculum, args.length_curriculum_nll, args.length_curriculum_share
        )
    if args.training == "hard_em":
        possible = number_of_plans(config)
        if args.num_beams > possible:
            raise ValueError(f"num_beams={args.num_beams}: there are only {possible} plans under these quotas")
        state["cache"] = PlanCache(rows, len(config.types), config.max_quota)
        state["schedule"] = EStepSchedule(args.adaptive_e_step, args.staleness_threshold, args.max_e_step_every)
    return state


def save_state(folder: str, state: nn.Module, settings: dict[str, Any]) -> None:
    """Buffers of `state`, and the settings."""
    save_file(state.state_dict(), Path(folder, TENSORS))
    Path(folder, SETTINGS).write_text(json.dumps(settings, indent=1) + "\n")


def load_state(folder: str, state: nn.Module) -> None:
    """Buffers of `state`, checked before by `check_state`."""
    state.load_state_dict(load_file(Path(folder, TENSORS)))


def check_state(folder: Path, state: nn.Module, settings: dict[str, Any]) -> None:
    """Raises a CheckpointError that names the file that is missing, the setting that differs, or the tensor."""
    for name in (TENSORS, SETTINGS):
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder / name} is missing: the checkpoint was not written by a run that plans")
    saved = json.loads((folder / SETTINGS).read_text())
    for name, value in settings.items():
        if not isinstance(saved, dict) or name not in saved:
            raise CheckpointError(f"{folder / SETTINGS} has no {name!r}")
        if saved[name] == value:
            continue
        if name == "dataset":
            raise CheckpointError(
                f"{folder} keeps a plan for each row of another training dataset; resume with that one, or start a new run "
                "from the saved model"
            )
        raise CheckpointError(f"{folder / SETTINGS} has {name}={saved[name]!r}, this run {value!r}")
    wanted = {name: list(tensor.shape) for name, tensor in state.state_dict().items()}
    with safe_open(folder / TENSORS, framework="pt") as tensors:
        found = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 - not a dict
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{folder / TENSORS}: {name} is {found.get(name, 'missing')}, this run needs {wanted.get(name, 'none')}"
            )
    check_finite([folder / TENSORS], buffers={"curriculum.nll"})  # infinite until something was measured
