"""The planner's state in checkpoints, `planner_state.safetensors`, and the settings that must match on resume, in its
JSON."""

from pathlib import Path
from typing import Any

from torch import nn

from unsloth_ext.planner.config import PlannerConfig

from ..common.saved_weights import CheckpointError
from ..common.state_file import check_state, load_state, saved_shapes, tensors_file
from .config import PlannerExecutorConfig
from .curriculum import LengthCurriculum
from .em import EStepSchedule, PlanCache, number_of_plans
from .losses import UsageAverage
from .method import METHOD
from .quota import PlannerQuotaController


OTHER_ROWS = (
    "its plans belong to the rows of another training dataset; resume with that one, or start a new run from the saved "
    "model"
)


def new_state(args: PlannerExecutorConfig, config: PlannerConfig, rows: int) -> nn.ModuleDict:
    """The state of a new run with `rows` training rows.

    Raises:
        ValueError: there are fewer possible plans than beams.
    """
    state = nn.ModuleDict({"usage": UsageAverage([kind.num_concepts for kind in config.types], args.usage_window)})
    targets = args.targets(config) if args.training == "soft" else None  # a fixed plan has no expected length
    if targets is not None:
        state["quota"] = PlannerQuotaController(targets, [kind.quota for kind in config.types], args.quota_rate)
    if args.length_curriculum is not None:
        state["curriculum"] = LengthCurriculum(
            args.length_curriculum, args.length_curriculum_nll, args.length_curriculum_share
        )
    if args.training == "hard_em":
        possible = number_of_plans(config)
        if args.num_beams > possible:
            raise ValueError(
                f"num_beams={args.num_beams}: there are only {possible} plans under these quotas; lower it"
            )
        state["cache"] = PlanCache(rows, len(config.types), config.max_quota)
        state["schedule"] = EStepSchedule(args.adaptive_e_step, args.staleness_threshold, args.max_e_step_every)
    return state


def load_planner_state(folder: str | Path, state: nn.Module) -> None:
    """Fill `state` from a checkpoint. Call `check_planner_state` first."""
    state.load_state_dict(load_state(folder, METHOD.name))


def check_planner_state(folder: Path, state: nn.Module, settings: dict[str, Any]) -> None:
    """Raise a CheckpointError that names the missing file, the differing setting, or the tensor of another shape."""
    infinite = {"curriculum.nll"}  # before the first measurement
    check_state(folder, METHOD.name, settings, {"dataset": OTHER_ROWS}, infinite=infinite)
    wanted = {name: list(tensor.shape) for name, tensor in state.state_dict().items()}
    found = saved_shapes(folder, METHOD.name)
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            raise CheckpointError(
                f"{tensors_file(folder, METHOD.name)}: {name} is {found.get(name, 'missing')}, but this run needs "
                f"{wanted.get(name, 'none')}"
            )
