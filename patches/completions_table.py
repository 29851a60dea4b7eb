"""Patch of TRL's table of sampled completions (`log_completions`), which reads column names as markup.

In TRL 1.15 a reward function or an extra column called `[/x]` ends training, and a reward model called `rm[v2]` loses
half its name.
"""

import functools
import sys
from typing import Any

from .registry import Patch, Site, apply


NAME = "completions_table"
FUNCTION = "print_prompt_completions_sample"


def ensure() -> None:
    """Apply this patch."""
    apply(NAME)


def _sites(*owners: Any) -> list[Site]:
    import trl
    from trl.trainer import grpo_trainer, utils

    found = owners or (utils, grpo_trainer, sys.modules[trl.GRPOTrainer.__module__])  # the last may be Unsloth's
    return [(owner, FUNCTION) for owner in dict.fromkeys(found) if hasattr(owner, FUNCTION)]


def _wrap(original: Any) -> Any:
    from rich import markup

    def escaped(columns: dict | None) -> dict:
        return {markup.escape(str(name)): values for name, values in (columns or {}).items()}

    @functools.wraps(original)
    def print_prompt_completions_sample(prompts, completions, rewards, *args, extra=None, **kwargs):
        return original(prompts, completions, escaped(rewards), *args, extra=escaped(extra), **kwargs)

    return print_prompt_completions_sample


PATCH = Patch(
    name=NAME,
    package="trl",
    target="trl.trainer.utils.print_prompt_completions_sample",
    parameters=("prompts", "completions", "rewards", "advantages", "step", "num_samples", "extra"),
    sites=_sites,
    wrap=_wrap,
    places=("trl/trainer/utils.py:print_prompt_completions_sample",),
    effect="The names of columns are printed as they are, and not read as rich's markup.",
    reason="GRPO, HRPO, PPO and SPO with `log_completions`: a name such as `[/x]` ends training",
    upstream="no upstream issue is known",
    removable="when TRL escapes the names, or prints the table without markup",
)
