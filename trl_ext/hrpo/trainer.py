"""HRPO on top of the GRPOTrainer in place, TRL's or Unsloth's. The differences from GRPO:

- Rollouts: `_generate_single_turn` lets the parent generate, but with hybrid decoding, and keeps what the training
  forward will need (`unsloth_ext.hrpo.recompute.trace_fields`).
- The batch: `_generate_and_score_completions` adds these tensors, and the parent shuffles and splits them.
- Log-probabilities: `_get_per_token_logps_and_entropies` passes the thinking states to the model. The old policy and
  the loss use the same code, so the importance ratio is 1 at the first inner step. The KL reference does not think.
- Soft tokens: the log-probability of a thinking token is the likelihood of its mixture (`unsloth_ext.hrpo.soft_tokens`).
- Optimizer: `create_optimizer` splits the parent's groups by learning rate, `_clip_grad_norm` clips each group
  separately.

Loss, rewards, advantages, logging and the training loop are the parent's.
"""

import contextlib
import copy
import functools
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import ProcessorMixin
from transformers.utils import logging

from unsloth_ext.common.delimiter import DelimiterMatcher
from unsloth_ext.common.padded_batches import check_batches
from unsloth_ext.common.settings_file import read_json
from unsloth_ext.common.wrapping import backbone_of, unwrapped
from unsloth_ext.hrpo.adapter import free_originals, with_thinking_modules
from unsloth_ext.hrpo.decoding import SOFT_KEPT, HybridSession, ThinkingTrace, hybrid_decode
from unsloth_ext.hrpo.forward import decoder_of
from unsloth_ext.hrpo.method import METHOD
from unsloth_ext.hrpo.recompute import thinking_keywords, trace_fields
from unsloth_ext.hrpo.residual import attach_thinking, has_thinking
from unsloth_ext.hrpo.soft_tokens import soft_log_probs
from unsloth_ext.hrpo.states import SOFT_SOURCES, Warper

from ..common.engines import check_engine
from ..common.grpo_checkpointing import GRPOCheckpointMixin
from ..common.metric_sums import ExactMeans
from ..common.model_loading import attach_saved, keeping_master_weights, preparing_models
from ..common.one_unit import OneUnitMixin
from ..common.parameter_groups import clip_each_role, split_by_role
from ..common.rollout_diagnostics import RolloutDiagnostics
from ..common.rollouts import rollouts_by
from ..common.sampling import check_generation_kwargs, check_vllm_rollouts, rollout_config, warn_of_truncation
from ..common.vllm_pushes import pushing_weights
from . import vllm_rollout
from .config import HRPOArguments
from .monitors import GateMonitor, log_ratio, ratio_deviation


logger = logging.get_logger(__name__)


SOFT_PAPERS = {
    "soft_gaussian": {
        "title": "Soft Tokens, Hard Truths",
        "id": "2509.19170",
        "citation": (
            "@article{butt2025soft,\n  title = {Soft Tokens, Hard Truths},\n  author = {Natasha Butt and Ariel Kwiatkowski "
            "and Ismail Labiad and Julia Kempe and Yann Ollivier},\n  year = 2025,\n  eprint = {arXiv:2509.19170},\n}"
        ),
    },
    "soft_gumbel": {
        "title": "SofT-GRPO: Surpassing Discrete-Token LLM Reinforcement Learning via Gumbel-Reparameterized "
        "Soft-Thinking Policy Optimization",
        "id": "2511.06411",
        "citation": (
            "@article{zheng2025softgrpo,\n  title = {SofT-GRPO: Surpassing Discrete-Token LLM Reinforcement Learning via "
            "Gumbel-Reparameterized Soft-Thinking Policy Optimization},\n  author = {Zhi Zheng and Yu Gu and Wei Liu and "
            "Yee Whye Teh and Wee Sun Lee},\n  year = 2025,\n  eprint = {arXiv:2511.06411},\n}"
        ),
    },
}


class HRPOMixin(OneUnitMixin, ExactMeans, GRPOCheckpointMixin):
    """GRPO with hybrid latent reasoning (HRPO, arXiv 2505.18454): a drop-in for TRL's `GRPOTrainer`.

    Constructor, callbacks, logging and files are the parent's, plus the fields of `HRPOConfig`. Any causal LM works.
    Thinking modules are attached if the model has none. With `thinking=False`, and where thinking cannot work (tools,
    environments, rollout functions, images, beam search), the trainer equals its parent.

    Args:
        model: a causal LM or its name, as in `GRPOTrainer`.
        reward_funcs: as in `GRPOTrainer`.
        args: an `HRPOConfig`; None: the defaults.

    Raises:
        ValueError: in the constructor, for continuous batching, for a delimiter that the tokenizer cannot produce, or
            with `use_vllm` for a model that vLLM cannot think with.
        ImportError: in the constructor, with `use_vllm` if vLLM is missing or of a version that was not tested.
        RuntimeError: in the constructor, if Unsloth replaced TRL's trainer after this class was made.
    """

    _tag_names = ["trl", "grpo", "hrpo"]
    _name = "HRPO"
    _latent_method = "hrpo"
    _paper = {
        "title": "Hybrid Latent Reasoning via Reinforcement Learning",
        "id": "2505.18454",
        "citation": (
            "@article{yue2025hybrid,\n  title = {Hybrid Latent Reasoning via Reinforcement Learning},\n  author = "
            "{Zhenrui Yue and Bowen Jin and Huimin Zeng and Honglei Zhuang and Zhen Qin and Jinsung Yoon and Lanyu "
            "Shang and Jiawei Han and Dong Wang},\n  year = 2025,\n  eprint = {arXiv:2505.18454},\n}"
        ),
    }

    def __init__(self, model: Any, reward_funcs: Any = None, args: Any = None, *positional: Any, **keywords: Any):
        self._check_parent()
        given = self._named(model, reward_funcs, args, *positional, **keywords)
        self.hrpo = args if isinstance(args, HRPOArguments) else HRPOArguments()
        self._saved: ThinkingTrace | None = None
        self._trace: ThinkingTrace | None = None
        self._new_logps: torch.Tensor | None = None
        self.thinking = self.hrpo.thinking and not self._cannot_think(given)
        self.soft = self.thinking and self.hrpo.soft_tokens
        self._one_unit = self.soft or (self.thinking and self.hrpo.recompute == "soft_bptt")
        use_vllm = getattr(args, "use_vllm", False)
        if not self.thinking:
            if use_vllm:
                vllm_rollout.refuse_thinking_model(given["model"], getattr(self.hrpo, "hub_token", None))
                self._check_plain_vllm(args)
            super().__init__(**given)
            self.add_callback(RolloutDiagnostics())
            return
        _refuse(args)
        if self.soft:
            self._check_soft()
            self._paper = SOFT_PAPERS[self.hrpo.thinking_source]
        alone = not getattr(args, "ds3_gather_for_generation", True)
        check_engine(args, "HRPO", {"ds3_gather_for_generation=False": alone})
        if use_vllm:
            self._check_vllm(args)
        else:
            check_generation_kwargs(getattr(args, "generation_kwargs", None))
        if given.get("peft_config") is not None:
            given["peft_config"] = copy.deepcopy(given["peft_config"])
            vars(given["peft_config"]).update(with_thinking_modules(given["peft_config"]))
        self._attach(given)
        with self._attaching(), keeping_master_weights(self, given["model"]), self._thinking_engine(args):
            super().__init__(**given)
        check_batches(self.model)
        backbone = backbone_of(self.model)
        source = backbone.thinking_config.thinking_source
        if source != self.hrpo.thinking_source and (self.soft or source in SOFT_SOURCES):
            raise ValueError(
                f"thinking_source={self.hrpo.thinking_source!r}: the model has thinking modules that were made with "
                f"{source!r}; set thinking_source to this, or remove them (unsloth_ext.drop_thinking)"
            )
        if is_peft_model(self.model):
            free_originals(backbone)
        self._freeze_unused()
        if self.is_deepspeed_enabled and self.hrpo.clip_grad_per_group and args.max_grad_norm:
            logger.warning(
                "clip_grad_per_group=True has no effect with DeepSpeed, which clips the norm of all gradients together"
            )
        self.matcher = DelimiterMatcher(
            self._tokenizer, self.hrpo.answer_delimiter, self.model.config.get_text_config().vocab_size
        )
        if use_vllm and args.vllm_mode == "server":
            vllm_rollout.check_server(self)
        decoding = rollout_config(self)
        warn_of_truncation(decoding, self.temperature)
        self.warper = Warper.of(decoding)
        self.fields = trace_fields(self.hrpo.recompute, source)
        self.monitor = GateMonitor(backbone)
        self.add_callback(RolloutDiagnostics(self.hrpo.answer_delimiter))

    # -- construction -----------------------------------------------------------------------------------------------

    def _check_vllm(self, args: Any) -> None:
        """Raise an error, before anything is loaded, if vLLM cannot make the rollouts."""
        vllm_rollout.check_vllm(args)

    def _check_soft(self) -> None:
        """Raise an error if this trainer cannot use soft tokens."""

    def _check_plain_vllm(self, args: Any) -> None:
        """The same for rollouts that do not think."""
        check_vllm_rollouts(args)

    def _cannot_think(self, given: dict[str, Any]) -> bool:
        for name in ("tools", "environment_factory", "rollout_func"):
            if given.get(name):
                logger.warning(f"HRPO: no thinking states with {name}; training is plain GRPO")
                return True
        beams = (getattr(given.get("args"), "generation_kwargs", None) or {}).get("num_beams", 1)
        if beams > 1:
            logger.warning(f"HRPO: no thinking states with num_beams={beams}; training is plain GRPO")
            return True
        if isinstance(given.get("processing_class"), ProcessorMixin) or _has_images(given.get("train_dataset")):
            logger.warning("HRPO: no thinking states with images; training is plain GRPO")
            return True
        return False

    def _named(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The parent's arguments by name."""
        return inspect.signature(self._stock_init).bind(*args, **kwargs).arguments

    def _check_parent(self) -> None:
        import trl

        if not isinstance(self, trl.GRPOTrainer):
            raise RuntimeError(
                f"{type(self).__name__} was created before trl.GRPOTrainer became {trl.GRPOTrainer.__module__}."
                f"{trl.GRPOTrainer.__name__}, so Unsloth's code would be bypassed: import unsloth first, then "
                "HRPOTrainer from trl_ext"
            )

    def _attach(self, given: dict[str, Any]) -> None:
        """Attach thinking modules to a model in memory.

        Args:
            given: the parent's arguments by name.
        """
        name = given["model"]
        if not isinstance(name, str):
            self._give(name)
            return
        if read_json(name, "adapter_config.json", None) is not None:
            raise ValueError(
                f"model={name!r} is an adapter: to train it further, pass FastThinkingModel.from_pretrained(...)[0]"
            )

    def _attaching(self) -> contextlib.AbstractContextManager:
        """While the parent constructs, attach thinking modules to each model that it loads by name, before PEFT wraps
        it."""
        return preparing_models(self._stock_init, self._give)

    def _thinking_engine(self, args: Any) -> contextlib.AbstractContextManager:
        """While the parent constructs, let the vLLM engine that it makes think."""
        colocate = getattr(args, "use_vllm", False) and args.vllm_mode == "colocate"
        return vllm_rollout.thinking_engine(self) if colocate else contextlib.nullcontext()

    def _give(self, model: nn.Module) -> None:
        """Attach thinking modules, saved ones or new ones, unless the model has them."""
        attach, token = functools.partial(attach_thinking, model), getattr(self.hrpo, "hub_token", None)
        if not has_thinking(model) and not attach_saved(model, METHOD, attach, token):
            attach(self.hrpo.thinking_config())

    def _freeze_unused(self) -> None:
        """Freeze modules that get no gradient, which DDP would wait for, and the projection if it is not to be trained."""
        backbone = backbone_of(self.model)
        if self.soft:
            for name in METHOD.modules:
                getattr(backbone, name).requires_grad_(False)
        unused = backbone.thinking_config.thinking_source != "projection" or self.hrpo.recompute == "frozen"
        if self.hrpo.lr_thinking_projection == 0 or unused:
            backbone.thinking_projection.requires_grad_(False)

    # -- rollout ----------------------------------------------------------------------------------------------------

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if not self.thinking:
            return super()._generate_single_turn(*args, **kwargs)
        if self.use_vllm:
            with pushing_weights(self), vllm_rollout.asking_for_traces(self) as name:
                completions, log_probs = super()._generate_single_turn(*args, **kwargs)
                self._trace = vllm_rollout.take_trace(self, name, completions, log_probs)
            return completions, log_probs
        model = self.accelerator.unwrap_model(self.model_wrapped)
        generate = model.generate

        def hybrid(*args: Any, **kwargs: Any) -> Any:
            session = HybridSession(model, self.matcher, keep=(*self.fields, "log_probs"))
            out = generate(*args, custom_generate=hybrid_decode, hybrid=session, **kwargs)
            self._trace = session.trace()
            return out

        with rollouts_by(self, model, hybrid):
            return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
        if not self.thinking:
            return super()._generate_and_score_completions(inputs)
        try:
            out = super()._generate_and_score_completions(inputs)
            length = out["completion_ids"].shape[1]
            trace = self._fitted_trace(length)
            out["thinking_mask"], out["rollout_logps"] = trace.thinking_mask, trace.log_probs
            out |= {name: getattr(trace, name) for name in self.fields}
            mode = "train" if self.model.training else "eval"
            real = out["completion_mask"].bool()
            ends = torch.isin(out["completion_ids"], torch.tensor(self.eos_token_ids, device=real.device))
            # EOS ends the thinking too. Any other non-thinking token is at or after the delimiter
            delimited = (real & ~ends & ~trace.thinking_mask).any(1)
            counts = torch.stack(
                [trace.thinking_mask.sum(), real.sum(), delimited.sum(), torch.as_tensor(len(real)).to(real.device)]
            )
            thinking, total, with_delimiter, rows = self.accelerator.gather(counts).view(-1, 4).sum(0).tolist()
            self._metrics[mode]["thinking/fraction"].append(thinking / max(total, 1))
            self._metrics[mode]["completions/delimiter_rate"].append(with_delimiter / rows)
            self._freeze_unused()  # TRL's `use_adapter` makes all weights of the adapter it activates trainable
            return out
        finally:
            self._trace = None

    def _fitted_trace(self, length: int) -> ThinkingTrace:
        return ThinkingTrace(**{name: _fit(value, length) for name, value in vars(self._trace).items()})

    # -- log-probs and loss -----------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        saved = self._saved
        if saved is None and self._trace is not None:  # log-probs of the old policy, computed during the rollout
            saved = self._fitted_trace(logits_to_keep)
        if saved is None or self._is_reference(model):
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs
            )
        size = batch_size or len(input_ids)
        logps, entropies, aux = self._within_forward(
            model, self._thinking_log_probs, saved, size, input_ids, attention_mask, logits_to_keep, kwargs
        )
        self._new_logps = logps
        return logps, entropies, aux

    def _thinking_log_probs(
        self,
        model: nn.Module,
        saved: ThinkingTrace,
        size: int,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The parent's log-probs, entropies and load-balancing loss, with the thinking states of a rollout.

        Args:
            model: the model to call.
            saved: the rollout's trace, for all rows.
            size: number of rows of one forward.
            input_ids, attention_mask (B, T): long.
            logits_to_keep: number of completion tokens C.
            options: further arguments of the parent.

        Returns:
            Log-probs (B, C), entropies (B, C) or None, and a scalar or None.
        """
        parts = []
        for start in range(0, len(input_ids), size):
            rows = slice(start, start + size)
            inputs = {"input_ids": input_ids[rows], "attention_mask": attention_mask[rows]}
            if self._takes_position_ids:
                # As in decoding: without them, left-padded rows of GPT-2 would be shifted; rotary models do not need them
                inputs["position_ids"] = (attention_mask[rows].cumsum(-1) - 1).clamp(min=0)
            part = ThinkingTrace(**{name: None if x is None else x[rows] for name, x in vars(saved).items()})
            extra = self._keywords(model, part, **inputs)
            if self._takes_position_ids:
                extra["position_ids"] = inputs["position_ids"]
            with self._seeing_hidden(model) as seen:
                found = super()._get_per_token_logps_and_entropies(
                    functools.partial(model, **extra), input_ids[rows], attention_mask[rows], logits_to_keep, **options
                )
            if self.soft:
                with self._autocast():
                    hidden_states = seen[0][:, -logits_to_keep - 1 : -1]
                    found = (soft_log_probs(unwrapped(model), hidden_states, part, found[0]), *found[1:])
            parts.append(found)
        logps, entropies, aux = zip(*parts, strict=True)
        return (
            torch.cat(logps),
            None if entropies[0] is None else torch.cat(entropies),
            None if aux[0] is None else torch.stack(aux).mean(),
        )

    @contextlib.contextmanager
    def _seeing_hidden(self, model: nn.Module) -> Iterator[list[torch.Tensor]]:
        """Collect the hidden states that the LM head is given, of each forward in the block, if soft tokens need them."""
        seen: list[torch.Tensor] = []
        if not self.soft:
            yield seen
            return
        decoder = decoder_of(unwrapped(model), backbone_of(model))
        hook = decoder.register_forward_hook(lambda _, __, output: seen.append(output[0]))
        try:
            yield seen
        finally:
            hook.remove()

    def _keywords(self, model: nn.Module, trace: ThinkingTrace, **inputs: torch.Tensor) -> dict[str, Any]:
        """Further arguments of the model's forward, so that it thinks.

        Args:
            model: the model to call.
            trace: the rollout's thinking mask and states.
            **inputs: `input_ids` and `attention_mask`, (B, T) long.
        """
        with self._autocast():
            return thinking_keywords(
                model, self.hrpo.recompute, trace, self.warper, self.hrpo.jacobi_iterations, **inputs
            )

    def _autocast(self) -> contextlib.AbstractContextManager:
        return self.accelerator.autocast()

    @functools.cached_property
    def _takes_position_ids(self) -> bool:
        return "position_ids" in inspect.signature(inspect.unwrap(type(backbone_of(self.model)).forward)).parameters

    def _is_reference(self, model: nn.Module) -> bool:
        """Whether the KL reference is asked for: the separate model, or ours with its adapter disabled or set to "ref"."""
        if self.ref_model is not None and model is self.ref_model:
            return True
        if not is_peft_model(self.accelerator.unwrap_model(self.model)):
            return False
        wrapper = backbone_of(self.model).thinking_residual_Lambda
        return wrapper.disable_adapters or "ref" in wrapper.active_adapters

    def _compute_loss(self, model, inputs):
        if not self.thinking:
            return super()._compute_loss(model, inputs)
        self._saved = _trace_in(inputs)
        try:
            with self.monitor.watching():
                loss = super()._compute_loss(model, inputs)
        finally:
            self._saved = None
        self._record_monitors(inputs, self._new_logps.detach(), inputs["completion_mask"])
        self._new_logps = None
        return loss

    def _record_monitors(self, inputs: dict[str, Any], new_logps: torch.Tensor, scored: torch.Tensor) -> None:
        """Record gates and importance ratio of one loss.

        Args:
            inputs: the batch.
            new_logps (B, C): float; log-probabilities of this loss.
            scored (B, C): 0 where the loss ignores a token.
        """
        metrics = self._metrics["train" if self.model.training else "eval"]
        thinking = inputs["thinking_mask"].sum()
        for name, mean in self.monitor.means().items():  # NaN without thinking tokens
            self._add_to_mean(name, (mean * thinking).nan_to_num(), thinking)
        deviation = self.accelerator.gather(ratio_deviation(new_logps, inputs["rollout_logps"], scored)).max().item()
        # Keep the maximum since the last log, because the parent would average
        metrics["thinking/ratio_deviation"] = [max([deviation, *metrics["thinking/ratio_deviation"]])]
        if self.soft:
            largest = log_ratio(new_logps, inputs["rollout_logps"], inputs["thinking_mask"] & scored.bool())
            largest = self.accelerator.gather(largest).max().item()
            metrics["thinking/log_ratio"] = [max([largest, *metrics["thinking/log_ratio"]])]

    # -- optimizer --------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        made = self.optimizer is None
        super().create_optimizer(model) if model is not None else super().create_optimizer()
        if made and self.thinking:
            rates = {
                "thinking_residual_gate": self.hrpo.lr_residual_gate,
                "thinking_residual_Lambda": self.hrpo.lr_residual_lambda,
                "thinking_projection": self.hrpo.lr_thinking_projection,
            }
            split_by_role(self.optimizer, self.model if model is None else model, rates)
        return self.optimizer

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        if not self.thinking or self.is_deepspeed_enabled:  # which clips all gradients together
            return super()._clip_grad_norm(model)
        bound = self.args.max_grad_norm
        if self.hrpo.clip_grad_per_group:
            self.accelerator.unscale_gradients()
            norms = clip_each_role(self.optimizer, bound)
            total = torch.stack(list(norms.values())).norm()
        else:
            total = super()._clip_grad_norm(model)
            shrunk = (bound / (total + 1e-6)).clamp(max=1)
            norms = {role: norm / shrunk for role, norm in clip_each_role(self.optimizer, float("inf")).items()}
        for role, norm in norms.items():
            name = {"thinking_projection": "thinking/projection_grad_norm"}.get(role, f"grad_norm/{role}")
            self._metrics["train"][name].append(norm.item())
        return total

    # -- logging ----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log the metrics, and in training how far the projection has moved."""
        if self.thinking and not self.soft and self.model.training:
            for name, value in self.monitor.projection_change().items():
                self._metrics["train"][name].append(value)
        super().log(logs, *args, **kwargs)


def _trace_in(inputs: dict[str, Any]) -> ThinkingTrace:
    """The rollout's trace in a batch. Rollouts in checkpoints from before 0.1 call hidden states "thinking_hidden"."""
    hidden_states = inputs.get("hidden_states", inputs.get("thinking_hidden"))
    soft = {name: inputs.get(name) for name in SOFT_KEPT}
    return ThinkingTrace(inputs["thinking_mask"], inputs.get("thinking_states"), hidden_states, **soft)


def _refuse(args: Any) -> None:
    """Raise a ValueError for settings with which thinking states cannot be decoded."""
    if getattr(args, "use_transformers_continuous_batching", False):
        raise ValueError(
            "use_transformers_continuous_batching=True: continuous batching cannot decode thinking states; set it to "
            "False, or thinking=False"
        )


def _has_images(dataset: Any) -> bool:
    columns = getattr(dataset, "column_names", None) or ()
    return bool({"image", "images"} & set(columns))


def _fit(tensor: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Cut or zero-pad (B, C, ...) on the right to (B, length, ...), as the parent pads completions."""
    if tensor is None or tensor.shape[1] == length:
        return tensor
    if tensor.shape[1] > length:
        return tensor[:, :length].contiguous()
    return torch.cat([tensor, tensor.new_zeros(len(tensor), length - tensor.shape[1], *tensor.shape[2:])], dim=1)
