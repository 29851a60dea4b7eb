"""How far an optimizer step moves each kind of small module and the adapters, relative to their weights, in the log.

    update/<role> = |w after the step - w before it| / |w before it|     over all parameters of the role

The first step of weights that begin at zero has no such size: it is left out. A run that trains no small module logs
what its parent does. A step is measured when it will be logged; of other steps nothing is kept or computed. After a
step, the processes of DDP have the same weights, so nobody asks the others. FSDP and DeepSpeed shard them: there,
nothing is logged.
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
}  # by the names of parameters; the first that fits. What has no role, a whole model above all, is not copied


class UpdateSizesMixin(mixin_bases.Trainer):
    """Put before a Trainer class that has `SafeCheckpointMixin`, whose names of what is trained it reads."""

    _watched: torch.optim.Optimizer | None = None
    _update_sizes: dict[str, torch.Tensor] | None = None
    _before_update: dict[str, tuple[list[nn.Parameter], list[torch.Tensor]]]

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        made = super().create_optimizer(*args, **kwargs)
        optimizer = self._torch_optimizer()  # of a trainer that trains again, accelerate's wrapper is there already
        if self._watched is not optimizer and self._own_format():
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
        if self._update_sizes and self.model.training:  # read from the device here alone
            sizes = torch.stack([size.to(self.args.device) for size in self._update_sizes.values()]).tolist()
            logs = {**logs, **{f"update/{role}": x for role, x in zip(self._update_sizes, sizes) if x != math.inf}}
            self._update_sizes.clear()
        super().log(logs, *args, **kwargs)
