"""PPO on TRL's GRPOTrainer. The differences from GRPO:

- `_advantages` replaces GRPO's advantages by generalized advantages, whitened over all tokens of the rollout.
- `_compute_loss` adds the value loss to the parent's token-level clipped loss and KL.
- `training_step` decides, after the last backward of a step, whether to take the step.
- The critic is part of the optimizer, averaged over processes, clipped separately, and saved in checkpoints under
  `critic/`.
"""

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from trl import GRPOTrainer

from unsloth_ext.common.compat import enable_checkpointing

from ..common.checkpointing import CheckpointError
from ..common.engines import check_engine
from ..common.grpo_checkpointing import GRPOCheckpointMixin
from ..common.metric_sums import ExactMeans
from ..common.model_loading import default_args, is_adapted, name_of
from ..common.modules_beside import parameter_groups
from ..common.single_sample import OwnAdvantages
from .advantages import clipped_value_loss, generalized_advantages, moments
from .config import PPOConfig
from .critic import critic_of, load_critic, ready, values_before


CRITIC = "critic"
STOPPED = "stopped"  # key on the batches of a stopped rollout; checkpoints keep it


class PPOTrainer(ExactMeans, OwnAdvantages, GRPOCheckpointMixin, GRPOTrainer):
    """Proximal Policy Optimization (arXiv 1707.06347): TRL's `GRPOTrainer` with a critic.

    loss = policy + beta * KL (k3) + vf_coef * value, each a mean over the tokens of a whole step. Skipped steps count
    as steps: schedule, logs and checkpoints continue, but nothing is computed for the rest of the rollout.

    Args:
        model: the policy, or its name.
        reward_funcs: as in `GRPOTrainer`.
        args: the configuration; None: the defaults.
        *others: further arguments of `GRPOTrainer`.
        critic_model: a token classifier with one label, or its hub id or folder; a language model gets a new head.
            None: the policy's backbone, with adapters merged, and a head of zeros. All of its weights are trained,
            without dropout.
        **keywords: further arguments of `GRPOTrainer`.

    Attributes:
        critic: the model that values tokens.

    Raises:
        ValueError: in the constructor, for an architecture without a stock token classifier, images, DeepSpeed or FSDP.
    """

    _unknown_as_nan = (*GRPOCheckpointMixin._unknown_as_nan, "returns")  # NaN at tokens that are not trained
    _tag_names = ["trl", "ppo"]
    _name = "PPO"
    _paper = {
        "title": "Proximal Policy Optimization Algorithms",
        "id": "1707.06347",
        "citation": (
            "@article{schulman2017proximal,\n  title = {Proximal Policy Optimization Algorithms},\n  author = {John "
            "Schulman and Filip Wolski and Prafulla Dhariwal and Alec Radford and Oleg Klimov},\n  year = 2017,\n  "
            "eprint = {arXiv:1707.06347},\n}"
        ),
    }

    def __init__(
        self,
        model: Any,
        reward_funcs: Any = None,
        args: PPOConfig | None = None,
        *others: Any,
        critic_model: PreTrainedModel | str | None = None,
        **keywords: Any,
    ):
        args = default_args(model, PPOConfig, self._name) if args is None else args
        if not isinstance(args, PPOConfig):
            raise ValueError(f"args is a {type(args).__name__}; PPO needs a PPOConfig")
        given = (
            inspect.signature(GRPOTrainer.__init__).bind(self, model, reward_funcs, args, *others, **keywords).arguments
        )
        check_engine(args, self._name, {"fp16=True": args.fp16})
        if args.beta and not name_of(model) and not is_adapted(model, given.get("peft_config")):
            raise ValueError(
                f"beta={args.beta}: the reference is loaded by the model's name, but this model has none; "
                "save it and pass the folder, or set beta=0"
            )
        super().__init__(model, reward_funcs, args, *others, **keywords)
        if self._is_vlm:
            raise ValueError(
                "processing_class is a processor, but PPO's critic reads text only; use a text model's tokenizer"
            )
        if critic_model is None:
            self.critic = critic_of(self.model)
        elif isinstance(critic_model, str):
            self.critic = load_critic(critic_model, self.model.dtype, args.trust_remote_code)
        else:
            self.critic = critic_model
        ready(self.critic, len(self._tokenizer), self.accelerator.device)
        if args.gradient_checkpointing:
            enable_checkpointing(self.critic, args.gradient_checkpointing_kwargs)
        self._divergences: list[torch.Tensor] = []  # (sum, tokens) for each batch of the current step
        self._dropping = False

    # -- rollout ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _advantages(self, inputs: list[dict[str, Any]], output: dict[str, Any], rewards: torch.Tensor) -> torch.Tensor:
        values, mask = self._values(output), _mask(output)
        rewards = self._local(rewards, len(inputs))
        mask = mask * (~rewards.isnan()).unsqueeze(1)
        args = self.args
        advantages = generalized_advantages(rewards.nan_to_num(), values, mask, args.gamma, args.gae_lambda)
        returns = advantages + values
        output["values"], output["returns"] = values, returns.masked_fill(mask == 0, torch.nan)
        mean, variance = moments(advantages, mask, self._total)
        metrics = self._metrics["train"]
        metrics["ppo/value"].append(moments(values, mask, self._total)[0].item())
        explained = 1 - variance / moments(returns, mask, self._total)[1]
        metrics["ppo/explained_variance"].append(explained.where(explained.isfinite(), torch.nan).item())
        return (advantages - mean) * torch.rsqrt(variance + 1e-8) * mask

    def _values(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The value before each token of the completions, (B, C) float32."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        attention = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        size, length = self.args.per_device_train_batch_size, inputs["completion_ids"].shape[1]
        with self.accelerator.autocast():
            chunks = zip(ids.split(size), attention.split(size), strict=True)
            return torch.cat([values_before(self.critic, *chunk, length) for chunk in chunks])

    def _total(self, x: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over processes, bit-identical on all of them, so that they decide alike."""
        return self.accelerator.gather(x.unsqueeze(0)).sum(0)

    # -- loss -------------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        self._log_probs = found[0].detach()
        return found

    def _compute_loss(self, model: nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        if STOPPED in inputs:
            return self._zero_loss()
        loss = super()._compute_loss(model, inputs)
        if "returns" not in inputs:  # evaluation
            return loss
        mask = _mask(inputs)
        divergence = 0.5 * (self._log_probs - inputs.get("old_per_token_logps", self._log_probs)).square()
        self._divergences.append(torch.stack([(divergence * mask).sum(), mask.sum()]))
        return loss + self.args.vf_coef * self._value_loss(inputs) if self.args.vf_coef else loss

    def _zero_loss(self) -> torch.Tensor:
        """Zero, with a gradient that engines accept: of the critic, which DDP does not wait for; ZeRO-1 and 2 want one."""
        found = (*(self.model.parameters() if self.is_deepspeed_enabled else ()), *self.critic.parameters())
        return 0 * next(p for p in found if p.requires_grad and p.numel()).sum()

    def _value_loss(self, inputs: dict[str, Any]) -> torch.Tensor:
        """The value loss of this batch, scaled like the parent's loss as a part of the mean over the step's tokens."""
        learnt = ~inputs["returns"].isnan()
        returns = inputs["returns"].nan_to_num()
        losses = clipped_value_loss(self._values(inputs), inputs["values"], returns, self.args.cliprange_value) * learnt
        self._add_to_mean("ppo/value_loss", losses.sum(), learnt.sum())
        share = self.current_gradient_accumulation_steps / self.args.steps_per_generation
        return losses.sum() / (inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes * share)

    # -- step -------------------------------------------------------------------------------------------------------

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if "returns" in inputs and self.accelerator.sync_gradients:
            self._decide()
        return loss

    def _decide(self) -> None:
        """Decide whether to take the step, after its last forward. DeepSpeed takes it within the backward."""
        self._dropping = STOPPED in self._buffered_inputs[0]
        if self._divergences:
            total, tokens = self._total(torch.stack(self._divergences).sum(0))
            self._divergences.clear()
            divergence = (total / tokens.clamp(min=1)).item()
            self._metrics["train"]["ppo/approx_kl"].append(divergence)
            if self.args.target_kl is not None and divergence > self.args.target_kl:
                self._dropping = True
                for batch in self._buffered_inputs:
                    batch[STOPPED] = True
        self._metrics["train"]["ppo/stopped"].append(float(self._dropping))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self._divergences:  # Trainer clears only the policy's gradients
            self.critic.zero_grad()
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients:
            self._step_critic()
        return loss

    def _step_critic(self) -> None:
        """Average the critic's gradients over processes, and take its step if its optimizer is its own."""
        if not self._dropping and self.args.vf_coef:
            self._end_step_beside(self.critic.parameters(), self.args.max_grad_norm)

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        norm = super()._clip_grad_norm(model)
        if self._optimizer_beside is None:
            nn.utils.clip_grad_norm_(self.critic.parameters(), self.args.max_grad_norm)
        return norm

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        groups = parameter_groups(self, self.critic, self.args.critic_learning_rate)
        if self._train_beside(optimizer, groups):
            optimizer.register_step_pre_hook(self._drop)
        return optimizer

    def _drop(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Remove all gradients of a skipped step, so that neither moments nor weights change.

        This is done just before the step, because a loss scaler needs the gradients until then.
        """
        if self._dropping:
            optimizer.zero_grad()

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _modules_beside(self) -> dict[str, nn.Module]:
        return {**super()._modules_beside(), CRITIC: self.critic}

    def _check_beside(self, checkpoint: Path) -> None:
        folder = checkpoint / CRITIC
        if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
            raise CheckpointError(f"{folder} holds no critic: the checkpoint was not written by PPO, or it is damaged")
        kind, made = type(self.critic).__name__, json.loads((folder / "config.json").read_text()).get("architectures")
        if made != [kind]:
            raise CheckpointError(f"{folder} holds another critic: {made} instead of this run's {kind}")
        super()._check_beside(checkpoint)


def _mask(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Mask (B, C) of the tokens of completions that the policy wrote."""
    mask = inputs["completion_mask"]
    return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
