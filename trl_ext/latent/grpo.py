"""GRPO of a model that thinks in latent tokens. The differences from TRL's GRPOTrainer:

- Rollouts: `_generate_single_turn` lets the parent generate, but after latent tokens. `_tokenize_prompts` reads a question
  as in the training of these.
- Log-probabilities: the parent calls the model through `_after_thinking`, which runs the latent phase of the questions with
  gradient, then the completions on its cache. The old policy and the loss use the same code, so the importance ratio is
  1 at the first inner step.

Latent tokens are a function of the question, so the policy's only random choices are the tokens after them. Loss, rewards,
advantages, logging and the training loop are the parent's.
"""

import copy
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch import nn
from transformers import GenerationConfig, PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.data_utils import is_conversational

from unsloth_ext.common.attaching import settings_of
from unsloth_ext.common.compat import CACHE
from unsloth_ext.common.question_ids import question_ids
from unsloth_ext.common.wrapping import backbone_of, unwrapped
from unsloth_ext.latent.config import check_adapter, remember_latent, with_latent_modules
from unsloth_ext.latent.method import METHOD
from unsloth_ext.latent.model import LatentModel, latent_generate
from unsloth_ext.latent.phase import latent_phase, norm_ratio

from ..common.config_checks import check_values, must_be_off, must_stay
from ..common.engines import check_engine
from ..common.grpo_checkpointing import GRPOCheckpointMixin
from ..common.metric_sums import ExactMeans
from ..common.model_loading import default_args, is_adapted, keeping_master_weights, no_router_loss
from ..common.one_unit import OneUnitMixin
from ..common.rollout_diagnostics import RolloutDiagnostics
from ..common.rollouts import generating_by, rollouts_by
from ..common.sampling import check_generation_kwargs, rollout_config, warn_of_truncation


@dataclass
class LatentGRPOConfig(GRPOConfig):
    """Configuration of `LatentGRPOTrainer`: TRL's `GRPOConfig`, and whether to think.

    Raises:
        ValueError: a field has a value that does not work with latent tokens.
    """

    flags_title = "GRPO after latent tokens"

    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Must stay off: with it, transformers drops the cache in training."}
    )
    thinking: bool = field(
        default=True,
        metadata={"help": "Think in latent tokens. If false, the trainer is TRL's GRPOTrainer, bit for bit."},
    )
    allow_pickle_checkpoint: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint that holds pickled optimizer state (TRL's or transformers' own)."},
    )

    def __post_init__(self) -> None:
        check_values(self)
        super().__post_init__()
        if not self.thinking:
            return
        must_be_off(
            self,
            gradient_checkpointing="transformers drops the cache with it, and latent tokens would not see the question",
            use_vllm="latent tokens are made by transformers",
            use_transformers_continuous_batching="it cannot begin with the cache of latent tokens",
        )
        must_stay(self, "the reference model of the KL term would answer without latent tokens; only", beta=0.0)
        check_generation_kwargs(self.generation_kwargs)


class LatentGRPOTrainer(OneUnitMixin, ExactMeans, GRPOCheckpointMixin, GRPOTrainer):
    """GRPO (arXiv 2402.03300) of a model with latent tokens: CODI, PCCoT, KaVa, LOTUS or Coconut has trained it. A drop-in
    for TRL's `GRPOTrainer`.

    A completion is what the model writes after its latent tokens: the answer prompt and the answer.

    Args:
        model: a model with latent tokens (`LatentModel.from_pretrained(folder).model`), or its folder or hub id.
        *others: further arguments of `GRPOTrainer`.
        **keywords: further arguments of `GRPOTrainer`.

    Raises:
        ValueError: in the constructor, for a model without latent tokens, an adapter that would not train them, tools,
            environments, rollout functions or images.
    """

    _tag_names = ["trl", "grpo", "latent-cot"]
    _name = "Latent GRPO"
    _latent_method = "latent"

    def __init__(self, model: Any, *others: Any, **keywords: Any):
        given = inspect.signature(self._stock_init).bind(model, *others, **keywords).arguments
        given |= given.pop("kwargs", {})
        if given.get("args") is None:
            given["args"] = default_args(model, LatentGRPOConfig, self._name)
        args = given["args"]
        if not isinstance(args, LatentGRPOConfig):
            raise ValueError(f"args is a {type(args).__name__}; GRPO after latent tokens needs a LatentGRPOConfig")
        self._one_unit = args.thinking
        if not args.thinking:
            super().__init__(**given)
            return
        for name in ("tools", "environment_factory", "rollout_func"):
            if given.get(name):
                raise ValueError(f"{name}: a completion is one text after latent tokens; leave it out")
        adapted = is_adapted(model, given.get("peft_config"))
        check_engine(args, "Latent distillation", {"an adapter": adapted})
        self._load(given)
        with keeping_master_weights(self, given["model"]):
            super().__init__(**given)
        no_router_loss(self, "question and completion are separate forward passes")
        if is_peft_model(self.model):
            remember_latent(self.model)
        warn_of_truncation(rollout_config(self), self.temperature)
        self.add_callback(RolloutDiagnostics())

    @staticmethod
    def _load(given: dict[str, Any]) -> None:
        """Load a model by name with its latent tokens, and let its adapter train them.

        Args:
            given: the arguments of `GRPOTrainer`, which are changed.
        """
        model, args, adapter = given["model"], given["args"], given.get("peft_config")
        if isinstance(model, str):
            loaded = LatentModel.from_pretrained(model, **(args.model_init_kwargs or {}))
            args.model_init_kwargs = None
            given["model"] = model = loaded.model
            given["processing_class"] = given.get("processing_class") or loaded.tokenizer
        if not isinstance(model, PreTrainedModel | nn.Module) or settings_of(model, METHOD) is None:
            raise ValueError(
                f"{type(model).__name__} has no latent tokens: train it with CODI, PCCoT, KaVa, LOTUS or Coconut first, "
                "and pass LatentModel.from_pretrained(folder).model"
            )
        if adapter is not None:
            given["peft_config"] = copy.deepcopy(adapter)
            vars(given["peft_config"]).update(with_latent_modules(adapter, model))
        elif is_peft_model(model):
            check_adapter(model)

    # -- rollout ----------------------------------------------------------------------------------------------------

    def _tokenize_prompts(self, prompts: list) -> Any:
        found = super()._tokenize_prompts(prompts)
        if not self.args.thinking or is_conversational({"prompt": prompts[0]}):
            return found
        return ([question_ids(self.processing_class, prompt) for prompt in prompts], *found[1:])

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        if not self.args.thinking:
            return super()._generate_single_turn(*args, **kwargs)
        model = self.accelerator.unwrap_model(self.model_wrapped)
        with rollouts_by(self, model, thinking_first(model)):
            return super()._generate_single_turn(*args, **kwargs)

    # -- log-probs --------------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self, model, input_ids, attention_mask, logits_to_keep, batch_size=None, **kwargs
    ):
        parents = super()._get_per_token_logps_and_entropies
        if not self.args.thinking:
            return parents(model, input_ids, attention_mask, logits_to_keep, batch_size, **kwargs)

        def work(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor) -> Any:
            forward = functools.partial(self._after_thinking, model, logits_to_keep)
            return parents(forward, ids, mask, logits_to_keep, batch_size, **kwargs)

        return self._within_forward(model, work, input_ids, attention_mask)

    def _after_thinking(
        self,
        model: nn.Module,
        length: int,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The forward of completions after the latent tokens of their questions, with gradient through these.

        Each question is thought about once, however many completions it has.

        Args:
            model: the model, wrapped by PEFT and DDP or not.
            length: C, the number of completion tokens.
            input_ids, attention_mask (B, Q + C): long, left-padded questions with their completions.
            labels (B, Q + C): long, or None.
            **options: further keywords of the model.

        Returns:
            The model's output for `<eot>` and the completions: C + 1 positions.
        """
        eot = backbone_of(model).latent_token_ids[2]
        questions = torch.cat([input_ids[:, :-length], attention_mask[:, :-length]], dim=1)
        different, rows = questions.unique(dim=0, return_inverse=True)
        bare = unwrapped(model)  # DDP must see only the forward below
        state = latent_phase(bare, *different.chunk(2, dim=1))
        if torch.is_grad_enabled():
            ratio = self.accelerator.gather(norm_ratio(bare, state)).mean().item()
            self._metrics["train"]["latent/norm_ratio"].append(ratio)
        state.cache.batch_select_indices(rows)
        ids = torch.cat([input_ids.new_full((len(rows), 1), eot), input_ids[:, -length:]], dim=1)
        real = torch.cat([attention_mask.new_ones(len(rows), 1), attention_mask[:, -length:]], dim=1)
        mask = torch.cat([state.attention_mask[rows], real], dim=1)
        if labels is not None:
            options["labels"] = torch.cat([labels.new_full((len(rows), 1), -100), labels[:, -length:]], dim=1)
        return model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1)[:, -ids.shape[1] :],
            use_cache=True,
            **{CACHE: state.cache},
            **options,
        )


def thinking_first(model: nn.Module) -> Callable[..., torch.Tensor]:
    """What takes the place of `model.generate`: it thinks before it writes, and returns prompts and completions without the
    latent tokens."""
    own = model.generate

    def generate(
        input_ids: torch.Tensor, attention_mask: torch.Tensor, generation_config: GenerationConfig, **settings: Any
    ) -> torch.Tensor:
        prompts, copies = alike(input_ids, attention_mask)
        settings["generation_config"] = each = copy.deepcopy(generation_config)
        each.num_return_sequences = copies
        with generating_by(model, own):
            out = latent_generate(model, input_ids[prompts], attention_mask[prompts], **settings)
        thought = backbone_of(model).latent_config.num_latents + 2
        width = input_ids.shape[1]
        return torch.cat([out[:, :width], out[:, width + thought :]], dim=1)

    return generate


def alike(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """The first rows of groups of equal neighbours, and the size of the groups. Where sizes differ, each row is a group.

    Args:
        ids, mask (B, T): long.

    Returns:
        (G,) long, and B / G.
    """
    both = torch.cat([ids, mask], dim=1)
    new = torch.ones(len(both), dtype=torch.bool, device=ids.device)
    new[1:] = (both[1:] != both[:-1]).any(1)
    first = new.nonzero()[:, 0]
    sizes = torch.diff(first, append=first.new_tensor([len(both)]))
    return (first, int(sizes[0])) if (sizes == sizes[0]).all() else (torch.arange(len(both), device=ids.device), 1)
