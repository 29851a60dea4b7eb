"""GRPO's rollouts and loss with another baseline than the group mean, so that one completion per prompt is enough."""

import contextlib
import inspect
import os
from dataclasses import dataclass, field
from typing import Any

import torch
import trl
from trl import GRPOConfig

from . import mixin_bases
from .config_checks import check_values, must_stay
from .rollout_diagnostics import RolloutDiagnostics
from .sampling import check_generation_kwargs, check_vllm_rollouts, rollout_config, warn_of_truncation
from .vllm_pushes import pushing_weights


@dataclass
class SingleSampleConfig(GRPOConfig):
    """`GRPOConfig` for one completion per prompt. There are no groups, so `scale_rewards` has no effect."""

    num_generations: int | None = field(default=1, metadata={"help": "Number of completions per prompt in a rollout."})
    loss_type: str = field(
        default="dapo", metadata={"help": "Loss type, as in GRPO; 'dapo' averages over the tokens of a whole step."}
    )

    def __post_init__(self) -> None:
        check_values(self)
        given, evaluations = self.num_generations, self.num_generations_eval
        if given == 1:  # GRPO refuses groups of one, as they have no baseline
            rows = self.per_device_train_batch_size * (self.steps_per_generation or self.gradient_accumulation_steps)
            self.num_generations = self.generation_batch_size or rows * int(os.environ.get("WORLD_SIZE", "1"))
            if self.num_generations < 2:
                raise ValueError(
                    f"per_device_train_batch_size={self.per_device_train_batch_size}: advantages are whitened over a "
                    "rollout, which needs at least 2 completions; raise it, or gradient_accumulation_steps"
                )
            self.num_generations_eval: int | None = evaluations or 1
        super().__post_init__()
        self.num_generations, self.num_generations_eval = given, evaluations
        why = "rewards are weighted and summed, and there are no groups; leave it at"
        must_stay(self, why, multi_objective_aggregation="sum_then_normalize", scale_rewards="group")


class OwnAdvantages(mixin_bases.GRPOTrainer):
    """Replace GRPO's advantages in training by those of `_advantages`. Put it before a `GRPOTrainer`."""

    def __init__(self, *args: Any, **kwargs: Any):
        if trl.GRPOTrainer.__name__ != "GRPOTrainer":
            raise RuntimeError(
                f"{type(self).__name__} needs TRL's own GRPOTrainer, but Unsloth has replaced it. Unsloth's takes one "
                "advantage per completion and computes its loss elsewhere; do not import unsloth in this process"
            )
        given = inspect.signature(trl.GRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        if getattr(given.get("args"), "use_vllm", False):
            check_vllm_rollouts(given["args"])
        super().__init__(*args, **kwargs)
        if not self.use_vllm:
            check_generation_kwargs(self.args.generation_kwargs)
        warn_of_truncation(rollout_config(self), self.temperature)
        self.add_callback(RolloutDiagnostics())

    def _advantages(self, inputs: list[dict[str, Any]], output: dict[str, Any], rewards: torch.Tensor) -> torch.Tensor:
        """The advantages of this process's completions.

        Args:
            inputs: the rows of this process.
            output: GRPO's output for them, with completions in the order of the rows. Entries may be added.
            rewards (processes * B,): floating point; rewards of all processes. NaN where no reward function gave one.

        Returns:
            (B,) or (B, C), floating point.
        """
        raise NotImplementedError

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        with pushing_weights(self) if self.use_vllm else contextlib.nullcontext():
            return super()._generate(*args, **kwargs)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._rewards_per_func = super()._calculate_rewards(*args, **kwargs)
        return self._rewards_per_func

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if not self.model.training:
            return output
        found = self._rewards_per_func
        rewards = (found * self.reward_weights.to(found.device)).nansum(dim=1)
        rewards[found.isnan().all(dim=1)] = torch.nan
        output["advantages"] = self._advantages(inputs, output, rewards)
        self._log_advantages(output)
        if self.num_generations == 1:
            del self._metrics["train"]["frac_reward_zero_std"]  # there are no groups
        return output

    def _log_advantages(self, output: dict[str, Any]) -> None:
        """Replace GRPO's advantages in the table of completions. Advantages per token (B, C) are averaged over tokens."""
        advantages = output["advantages"]
        if advantages.dim() == 2:
            mask = output["completion_mask"]
            advantages = (advantages * mask).sum(1) / mask.sum(1).clamp(min=1)
        ours = self.accelerator.gather(advantages).tolist()
        logged = self._logs["advantages"]
        kept = list(logged)[: -len(ours)]
        logged.clear()
        logged.extend(kept + ours)

    def _local(self, values: torch.Tensor, rows: int) -> torch.Tensor:
        """This process's part of values (processes * rows, ...)."""
        first = self.accelerator.process_index * rows
        return values[first : first + rows]
