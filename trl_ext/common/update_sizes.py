"""The relative size of each optimizer step, by kind of small module and for adapters, in the log.

    update/<role> = |w after the step - w before it| / |w before it|     over all parameters of the role

The first step of weights that start at zero has no relative size and is left out. A run without small modules logs
nothing more than its parent. Only steps that will be logged are measured. After a step all DDP processes hold the same
weights, so no communication is needed. FSDP and DeepSpeed shard the weights: nothing is logged there.
"""

import math
import re
from typing import Any

import torch
from torch import nn

from . import mixin_bases


ROLES = {
    "gate": r"thinking_residual_gate",
    "lambda": r"thinking_residual_Lambda",
    "projection": r"(thinking|latent)_projection",
    "concept_head": r"concept_head",
    "concept_embedding": r"concept_embedding",
    "planner_head": r"unified_head",
    "aligner": r"^aligner\.",
    "critic_head": r"^critic\.(score|classifier)",
    "tokens": r"trainable_tokens_delta",
    "lora": r"lora_",
}  # patterns of parameter names; the first match counts. Other weights, such as a whole model, are not copied


class UpdateSizesMixin(mixin_bases.Trainer):
    """Log the relative sizes of updates. Put it before a Trainer class that has `SafeCheckpointMixin`."""

    _watched: torch.optim.Optimizer | None = None
    _update_sizes: dict[str, torch.Tensor] | None = None
    _before_update: dict[str, tuple[list[nn.Parameter], list[torch.Tensor]]]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = super().create_optimizer(*args, **kwargs)
        optimizer = self._torch_optimizer()  # unwrapped: on a second train(), accelerate has wrapped it
        if self._watched is not optimizer and not self._sharded():
            self._watched, self._update_sizes, self._before_update = optimizer, {}, {}
            optimizer.register_step_pre_hook(self._keep_weights)
            optimizer.register_step_post_hook(self._measure_update)
        return made

    def _will_log(self) -> bool:
        step, every = self.state.global_step + 1, max(1, int(self.state.logging_steps))
        return step % every == 0 or (step == 1 and self.args.logging_first_step)

    def _by_role(self, optimizer: torch.optim.Optimizer) -> dict[str, list[nn.Parameter]]:
        optimized = {parameter for group in optimizer.param_groups for parameter in group["params"]}
        found: dict[str, list[nn.Parameter]] = {}
        for name, parameter in self._named_trained().items():
            role = next((role for role, pattern in ROLES.items() if re.search(pattern, name)), None)
            if role is not None and parameter in optimized and parameter.requires_grad:
                found.setdefault(role, []).append(parameter)
        return found if found.keys() - {"lora"} else {}

    @torch.no_grad()
    def _keep_weights(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if self._will_log():
            self._before_update = {
                role: (parameters, [p.detach().clone() for p in parameters])
                for role, parameters in self._by_role(optimizer).items()
            }

    @torch.no_grad()
    def _measure_update(self, *_: Any) -> None:
        for role, (parameters, before) in self._before_update.items():
            step = nn.utils.get_total_norm(torch._foreach_sub(parameters, before)).float()
            size = nn.utils.get_total_norm(before).float()
            self._update_sizes[role] = torch.where(size > 0, step / size, math.inf)
        self._before_update = {}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._update_sizes and self.model.training:  # the only place that waits for the device
            sizes = torch.stack([size.to(self.args.device) for size in self._update_sizes.values()]).tolist()
            logs = {**logs, **{f"update/{role}": x for role, x in zip(self._update_sizes, sizes) if x != math.inf}}
            self._update_sizes.clear()
        super().log(logs, *args, **kwargs)
