"""SFT of a model that compresses text into concepts while it reads.

The differences from SFT: concepts are attached before PEFT wraps the model. `compute_loss` sets how the gate decides at
this step, and adds the ratio and usage losses. The head and the embedding may have their own learning rate. With
`use_concepts=False` the trainer equals its parent.
"""

import contextlib
import copy
import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import logging
from trl import SFTTrainer

from unsloth_ext.common.evaluation_mode import evaluating
from unsloth_ext.common.sharding import changing_weights
from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.concept.codebook import set_codebook
from unsloth_ext.concept.forward import ConceptOutput
from unsloth_ext.concept.method import METHOD
from unsloth_ext.concept.modules import attach_concepts, with_concept_modules

from ..common.all_reduce import all_reduce_sum
from ..common.checkpointing import SafeCheckpointMixin
from ..common.codeword_usage import usage_kl_to_uniform
from ..common.engines import check_engine
from ..common.metric_sums import Sums
from ..common.model_loading import (
    attach_method,
    check_name,
    default_args,
    is_adapted,
    keeping_master_weights,
    no_router_loss,
    preparing_models,
    with_adapter,
)
from ..common.modules_beside import from_first_process
from ..common.parameter_groups import split_by_role
from ..common.update_sizes import UpdateSizesMixin
from .config import ConceptConfig
from .losses import ratio_loss


logger = logging.get_logger(__name__)
DECODER_INPUTS = ("input_ids", "attention_mask", "position_ids")
STATES_PER_CODEWORD, LEAST_STATES = 16, 8192  # hidden states for k-means, per codeword and at least


class ConceptTrainer(UpdateSizesMixin, SafeCheckpointMixin, SFTTrainer):
    """SFT with online concept compression. Ours. Concepts are attached before PEFT wraps the model, if it has none.

    Args:
        model: the model to train, or its name.
        args: the configuration; None: the defaults.
        *others: further arguments of `SFTTrainer`.
        **keywords: further arguments of `SFTTrainer`.

    Raises:
        ValueError: in the constructor, for a model whose layers cannot be split as configured, or whose adapter would
            not train the concepts.
    """

    _tag_names = ["trl", "concept-tokens"]
    _name = "Concept tokens"
    _latent_method = "concept"

    def __init__(self, model: Any, args: ConceptConfig | None = None, *others: Any, **keywords: Any):
        args = default_args(model, ConceptConfig, self._name) if args is None else args
        if not isinstance(args, ConceptConfig):
            raise ValueError(f"args is a {type(args).__name__}; concept tokens need a ConceptConfig")
        check_name(model)
        if not args.use_concepts:
            model, keywords["peft_config"] = with_adapter(model, keywords.get("peft_config"), args.seed)
            super().__init__(model, args, *others, **keywords)
            return
        options = {
            "an adapter": is_adapted(model, keywords.get("peft_config")),
            "codebook_init='kmeans'": args.codebook_init == "kmeans",
            "calibrate_null=True": args.calibrate_null,
        }
        check_engine(args, self._name, options)
        lora = keywords["peft_config"] = copy.deepcopy(keywords.get("peft_config"))
        if lora is not None:
            vars(lora).update(with_concept_modules(lora))
        if args.n_gpu > 1:
            args._n_gpu = 1  # disable nn.DataParallel: its replicas would decide separately
        self._fresh = False  # whether the concepts were attached here

        def give(model: PreTrainedModel) -> None:
            self._fresh |= prepare(model, args)

        if not isinstance(model, str):
            give(model)
            model, keywords["peft_config"] = with_adapter(model, lora, args.seed)
        with preparing_models(self._stock_init, give), keeping_master_weights(self, model):
            super().__init__(model, args, *others, **keywords)
        no_router_loss(self, "layers see different numbers of tokens")
        self._calibrated: int | None = None  # the last step at which the NULL bias was set
        self._seen: ConceptOutput | None = None
        self._sums = {"train": Sums(), "eval": Sums()}
        backbone_of(self.model).register_forward_hook(self._see)

    def _see(self, _: Any, __: Any, output: ConceptOutput) -> None:
        self._seen = output

    # -- how the gate decides now ------------------------------------------------------------------------------------

    @property
    def _warm_steps(self) -> int:
        return round(self.args.warm_start_share * self.state.max_steps)

    @contextlib.contextmanager
    def _deciding(self) -> Iterator[None]:
        """Set the gate as configured for this step, inside the block. Evaluation decides as inference does."""
        args, gate = self.args, backbone_of(self.model).concept_gate
        kept = vars(gate).copy()
        if self.model.training:
            done = self.state.global_step / max(1, self.state.max_steps)
            end = args.temperature if args.temperature_end is None else args.temperature_end
            gate.temperature = args.temperature * (end / args.temperature) ** done
            if self.state.global_step < self._warm_steps:
                config = backbone_of(self.model).concept_config
                gate.segment_as = replace(
                    config,
                    segmenter="fixed",
                    stride=round(args.target_ratio),
                    concepts_per_stride=1,
                    max_tail=None,
                    max_nulls=None,
                )
        try:
            yield
        finally:
            vars(gate).update(kept)

    def _look(self, inputs: dict[str, Any]) -> ConceptOutput:
        return backbone_of(self.model)(**{k: inputs[k] for k in DECODER_INPUTS if k in inputs}, use_cache=False)

    @torch.no_grad()
    def _make_codebook(self) -> None:
        """Initialise the codebook from shallow hidden states of training texts, the same in every process."""
        backbone, size = backbone_of(self.model), self.args.per_device_train_batch_size
        wanted = max(LEAST_STATES, STATES_PER_CODEWORD * backbone.concept_config.num_concepts)
        rows, states, found = iter(self.train_dataset.shuffle(seed=self.args.seed)), [], 0
        with evaluating(self.model):
            while found < wanted and (part := list(islice(rows, size))):
                seen = self._look(self._prepare_inputs(self.data_collator(part)))
                states.append(seen.shallow[seen.valid])
                found += len(states[-1])
        made = backbone.concept_head, backbone.concept_embedding
        with changing_weights(self.model, *made):
            set_codebook(backbone, torch.cat(states)[:wanted], self.args.seed)
            from_first_process(parameter for module in made for parameter in module.parameters())

    @torch.no_grad()
    def _calibrate(self, inputs: dict[str, Any]) -> None:
        """Set the NULL bias so that one token in R of this step's first batch would become a concept."""
        with evaluating(self.model):
            seen = self._look(inputs)
        logit = seen.choice.logit[seen.valid].float()
        together = self.accelerator.gather(self.accelerator.pad_across_processes(logit, pad_index=torch.nan))
        head = backbone_of(self.model).concept_head
        with changing_weights(self.model, head):
            head.bias[-1] += shift(together[~together.isnan()], self.args)

    # -- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.args.use_concepts:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        args, training = self.args, self.model.training
        mode = "train" if training else "eval"
        step = self.state.global_step
        if training and args.codebook_init == "kmeans" and self._fresh and step == 0:
            self._make_codebook()
            self._fresh = False
        if training and args.calibrate_null and step in (0, self._warm_steps) and self._calibrated != step:
            self._calibrate(inputs)
            self._calibrated = step  # only in the first micro-batch of the step
        with self._deciding():
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            temperature = backbone_of(self.model).concept_gate.temperature
        loss, outputs = result if return_outputs else (result, None)
        if training:
            self._temperature = temperature
        ce, sums = loss.detach(), self._sums[mode]
        if num_items_in_batch is None:
            scored = (inputs["labels"][:, 1:] != -100).sum()
            sums.weigh({"loss/ce": (ce * scored, scored)})
        else:
            sums.add(**{"loss/ce": ce})
        loss = self._with_terms(loss, sums, training and num_items_in_batch is not None)
        self._seen = None
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.args.use_concepts:
            counts = (batch.get("attention_mask", torch.ones_like(batch["input_ids"])).sum() for batch in samples)
            tokens = torch.as_tensor(sum(counts), dtype=torch.float64, device=device)
            self._step_tokens = self.accelerator.reduce(tokens, "sum").clamp(min=1)
        return samples, items

    def _with_terms(self, loss: torch.Tensor, sums: Sums, is_part: bool) -> torch.Tensor:
        """Add the weighted ratio and usage losses of the last forward, over all processes.

        In training they are scaled by this batch's share of the step's tokens.

        Args:
            loss: scalar, floating point.
            sums: collects the values to log.
            is_part: whether the loss is a part of a whole step's.
        """
        choice, valid, args = self._seen.choice, self._seen.valid, self.args
        config = backbone_of(self.model).concept_config
        own = torch.stack([valid.sum(), choice.concept.sum()]).to(choice.logit.dtype)
        tokens, concepts = self._all_reduce_sum(own)
        own_probability = (choice.probability * valid).sum()
        codes = choice.logits[choice.concept][:, :-1].unflatten(-1, (config.num_codebooks, -1))
        own_use = codes.softmax(-1).sum(0)
        use = self._all_reduce_sum(own_use) + torch.finfo(codes.dtype).tiny
        terms = {
            "ratio": (
                args.ratio_weight,
                ratio_loss(concepts / tokens, self._all_reduce_sum(own_probability) / tokens, args.target_ratio),
            ),
            "usage": (args.usage_weight, usage_kl_to_uniform(use)),
        }
        counts = torch.stack(
            [torch.bincount(ids, minlength=config.num_concepts) for ids in choice.ids[choice.concept].T]
        )
        sums.add(tokens=own[0], concepts=own[1], probability=own_probability, counts=counts, use=own_use)
        share = tokens.detach() / self._step_tokens if is_part else 1.0
        for name, (weight, term) in terms.items():
            if is_part:
                sums.add(**{f"loss/{name}": share * term})
            if weight:
                loss = loss + weight * share * term
        return loss

    def _log(self, mode: str) -> None:
        """Log metrics over the tokens of a whole step, or of an evaluation, of all processes."""
        sums, means = self._sums[mode].pop(lambda x: self.accelerator.reduce(x, "sum"))
        tokens, concepts = sums["tokens"].item(), sums["concepts"].item()
        shape = len(sums["counts"]) // backbone_of(self.model).concept_config.num_concepts, -1
        counts, use = ((sums[name] + torch.finfo(torch.float64).tiny).view(shape) for name in ("counts", "use"))
        figures = {name: x.item() / self.accelerator.num_processes for name, x in sums.items() if "loss/" in name}
        if "loss/ratio" not in figures:
            of_all = ratio_loss(concepts / tokens, sums["probability"].item() / tokens, self.args.target_ratio)
            figures |= {"loss/ratio": of_all, "loss/usage": usage_kl_to_uniform(use).item()}
        figures |= {
            "concept/ratio": tokens / max(1.0, concepts),
            "concept/probability": sums["probability"].item() / tokens,
            "concept/perplexity": math.exp(math.log(counts.shape[1]) - usage_kl_to_uniform(counts).item()),
            **({"concept/temperature": self._temperature} if mode == "train" else {}),
        }
        for name, value in {**figures, **means}.items():
            self._metrics[mode][name].append(value)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        if self.args.use_concepts and self.accelerator.sync_gradients:
            self._log("train")
        return loss

    def evaluation_loop(self, *args, **kwargs):
        output = super().evaluation_loop(*args, **kwargs)
        if self.args.use_concepts:
            self._log("eval")
        return output

    def _all_reduce_sum(self, local: torch.Tensor) -> torch.Tensor:
        return all_reduce_sum(local, lambda x: self.accelerator.reduce(x, "sum"), self.accelerator.num_processes)

    # -- learning rates -----------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        fresh = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if fresh and self.args.use_concepts and self.args.concept_learning_rate is not None:
            split_by_role(optimizer, self.model, {"concept_": self.args.concept_learning_rate})
        return optimizer


def prepare(model: PreTrainedModel, args: ConceptConfig) -> bool:
    """Attach concepts to a model unless it has them. Returns whether they are new; see `attach_method`."""
    asked = args.online(model.config.num_hidden_layers)
    return attach_method(model, METHOD, functools.partial(attach_concepts, model), asked, args.hub_token, args.seed)


def shift(logit: torch.Tensor, args: ConceptConfig) -> torch.Tensor:
    """The value to add to the NULL bias so that one token in R of those with the logits (n,), floating point, becomes a
    concept."""
    if args.segmenter != "threshold":
        return logit.quantile(1 - 1 / args.target_ratio)
    low, high = (
        logit.min() - 20,
        logit.max() + 20,
    )  # the number of concepts is the sum of probabilities, so solve by bisection
    for _ in range(60):
        middle = (low + high) / 2
        more = (logit - middle).sigmoid().mean() > 1 / args.target_ratio
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return middle
