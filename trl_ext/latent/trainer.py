"""The trainer behind CODI, PCCoT and KaVa: an SFTTrainer that reads each row twice, as teacher and as student.

The differences from SFT: `_prepare_dataset` tokenizes question, steps and answer. `compute_loss` runs the teacher, the
latent phase and the answer with the same weights. Everything else is the parent's.
"""

import contextlib
import itertools
import math
from functools import partial
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import nn
from torch.nn import functional as F
from transformers import DynamicCache
from transformers.utils import logging
from trl import SFTTrainer

from unsloth_ext.common.compat import CACHE
from unsloth_ext.common.logits import logits_of
from unsloth_ext.common.wrapping import backbone_of, causal_lm_of, unwrapped
from unsloth_ext.kv_compression.trace import compressed_trace
from unsloth_ext.latent.config import add_latent_tokens, remember_latent, think_from_now_on
from unsloth_ext.latent.phase import LatentState, branch, latent_phase, norm_ratio, prefill, project_latent

from ..common.checkpointing import SafeCheckpointMixin
from ..common.engines import check_engine
from ..common.model_loading import (
    check_name,
    default_args,
    is_adapted,
    keeping_master_weights,
    no_router_loss,
    preparing_models,
    with_adapter,
)
from ..common.modules_beside import parameter_groups
from ..common.one_unit import OneUnitMixin
from ..common.update_sizes import UpdateSizesMixin
from .config import LatentArguments
from .data import COLUMNS, RESULTS, STEP_ENDS, LatentCollator, check_lengths
from .losses import codi_loss, cross_entropy, kv_loss, latent_cross_entropy, latent_targets
from .preparation import Preparation, tokenizer_of
from .stages import in_stage
from .step_decoder import STEP_DECODER, same_everywhere, step_counts, step_losses, steps_of


logger = logging.get_logger(__name__)

LONG = 10.0  # latent inputs that are so many times as long as embeddings are warned of
# Terms of the loss. They are means over the student's tokens, the teacher's tokens, rows, kept trace tokens, and latent
# tokens that stand for one
COUNTED = ("ce_student", "ce_teacher", "codi", "kv", "latent_ce")


class LatentTrainer(OneUnitMixin, UpdateSizesMixin, SafeCheckpointMixin, SFTTrainer):
    """Self-distillation of explicit reasoning into latent tokens. Same constructor as `SFTTrainer`.

    Rows have `question`, `steps` (a list) and `answer`. Latent tokens are attached before PEFT wraps the model, if it
    has none.

    Args:
        model: the model to train, or its name.
        args: the method's configuration; None: the defaults.
        data_collator: must be None.
        train_dataset, eval_dataset: rows as above, or tokenized ones.
        processing_class: the tokenizer; None: the model's.
        *others: further arguments of `SFTTrainer`.
        **keywords: further arguments of `SFTTrainer`.

    Raises:
        ValueError: in the constructor, for a data collator, a model whose adapter would not train the latent tokens, or
            an unusable row.
        FloatingPointError: a term of the loss is NaN or infinite.
    """

    _latent_method = "latent"
    _only_in_checkpoints = (STEP_DECODER,)
    _warned_of_length = False
    _config_class: type[LatentArguments] | None = None  # set by each method

    def __init__(
        self,
        model: Any,
        args: LatentArguments | None = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *others: Any,
        **keywords: Any,
    ):
        if args is None and self._config_class is not None:
            args = default_args(model, self._config_class, self._name)
        if not isinstance(args, LatentArguments):
            raise ValueError(
                f"args is a {type(args).__name__}; latent distillation needs CODIConfig, PCCoTConfig or KAVAConfig"
            )
        if data_collator is not None:
            raise ValueError("data_collator: this trainer has its own; leave it out")
        if isinstance(train_dataset, Dataset) and not len(train_dataset):
            raise ValueError("train dataset: has no rows")
        adapted = is_adapted(model, keywords.get("peft_config"))
        options = {
            "an adapter": adapted,
            "reset_optimizer=True": args.reset_optimizer,
            "w_step_decoder": args.w_step_decoder,
            "w_step_decoder and fp16=True": args.w_step_decoder and args.fp16,
        }
        check_engine(args, "Latent distillation", options)
        tokenizer = tokenizer_of(model, args, processing_class)
        self._prepared = prepare = Preparation(model, args, tokenizer, keywords.get("peft_config"))
        check_name(model)
        keywords["peft_config"] = prepare.peft_config
        if not isinstance(model, str):
            prepare(model)
            model, keywords["peft_config"] = with_adapter(model, prepare.peft_config, args.seed)
        collator = LatentCollator(tokenizer.pad_token_id, add_latent_tokens(tokenizer, prepare.settings)[2])
        self._stages, self._stage = args.stages(), 0
        self._rows = args.rows(tokenizer)
        with preparing_models(self._stock_init, prepare), keeping_master_weights(self, model):
            super().__init__(model, args, collator, train_dataset, eval_dataset, tokenizer, *others, **keywords)
        no_router_loss(self, "question, latent tokens and answer are separate forward passes")
        self.model_accepts_loss_kwargs = True  # the loss is scaled as a part of the whole step
        self._step_decoder = prepare.step_decoder
        if self._step_decoder is not None:
            self._eos = tokenizer.eos_token_id
            self._step_decoder = same_everywhere(self._step_decoder, self.accelerator.device)
        if is_peft_model(self.model):
            remember_latent(self.model)
        self._enter_stage(0.0)

    # -- curriculum -------------------------------------------------------------------------------------------------

    def _enter_stage(self, epoch: float) -> bool:
        """Change to the stage of so many epochs, and say whether training was in another one before. Checkpoints hold the
        stage, so a resumed run says the same."""
        if self._stages is None:
            return False
        empty: dict[str, Any] = {"args": {}, "attributes": {"stage": 0}}
        saved = self.state.stateful_callbacks.setdefault("LatentStage", empty)["attributes"]
        stage = self._stages.at(epoch)
        if stage != self._stage:
            think_from_now_on(self.model, **self._stages.thinking(stage))
        changed = saved["stage"] not in (0, stage)
        self._stage = saved["stage"] = stage
        return changed

    def _in_stage(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return batch if self._stages is None else in_stage(batch, self._stages, self._stage)

    @property
    def _num_latents(self) -> int:
        return backbone_of(self.model).latent_config.num_latents

    # -- data -------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        if formatting_func is not None:
            raise ValueError("formatting_func: rows are question, steps and answer; map the dataset to these columns")
        columns = dataset.column_names
        if columns is None:  # columns of an iterable dataset are unknown before its first row
            dataset = dataset.map(self._rows, with_indices=True, fn_kwargs={"dataset": dataset_name})
            return _shuffled(dataset, args)
        tokenized = "question_ids" in columns
        missing = [name for name in (self._rows.columns if tokenized else COLUMNS) if name not in columns]
        if missing:
            raise ValueError(f"{dataset_name} dataset: column {missing[0]!r} is missing; it has {', '.join(columns)}")
        if not tokenized:
            dataset = dataset.map(
                self._rows, with_indices=True, remove_columns=columns, fn_kwargs={"dataset": dataset_name}
            )
        taught = (
            isinstance(dataset, Dataset)
            and dataset_name == "train"
            and (args.w_codi or args.w_kv or args.w_latent_ce or args.w_step_decoder)
        )
        if taught and not any(map(len, dataset["trace_ids"])):
            raise ValueError(
                "train dataset: no row has a reasoning trace for the teacher. drop_last_step=True removes the last step of "
                "each row, so rows need two steps; drop_last_step=False keeps it"
            )
        if self._prepared.positions and isinstance(dataset, Dataset):
            thought = self._prepared.settings.num_latents if self._stages is None else self._stages.longest
            check_lengths(dataset, dataset_name, self._prepared.positions, thought)
        return _shuffled(dataset, args)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(self._rows.columns)

    # -- loss -------------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if self._enter_stage(self.state.epoch or 0.0) and self.args.reset_optimizer:
            forget_moments(self.optimizer)
        samples, _ = super().get_batch_samples(epoch_iterator, num_batches, device)  # Unsloth's count has labels only
        if self._step_decoder is not None:  # Trainer clears only the model's gradients
            self._step_decoder.zero_grad()
        return samples, self._get_num_items_in_batch(samples, device)

    def _get_num_items_in_batch(self, batch_samples, device):
        """The number of items that each term of the loss is a mean over, in all micro-batches and processes: (5 + G,)
        float32, by `COUNTED`; with a step decoder also by its G groups of latent tokens."""
        counts = [self._counts(self._in_stage(batch), device) for batch in batch_samples]
        return self._all_sum(torch.stack(counts).sum(0)) if counts else None

    def _counts(self, batch: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
        traces = batch["trace_mask"].sum(1).clamp(max=self._num_latents)
        asked = [(batch[labels][:, at:] != -100).sum() for labels, at in (("labels", 1), ("teacher_labels", 0))]
        read = (self._targets(batch) != -100).sum() if self.args.w_latent_ce else torch.zeros_like(traces.sum())
        counts = torch.stack([*asked, torch.as_tensor(len(traces)), traces.sum(), read]).to(device, torch.float32)
        if self._step_decoder is None:
            return counts
        return torch.cat([counts, step_counts(self._steps(batch)).to(device)])

    def _targets(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the latent tokens stand for: (B, M), see `latent_targets`."""
        trace, args = (batch["teacher_ids"], batch["trace_mask"]), self.args
        steps = batch.get(STEP_ENDS), args.latents_per_step, batch.get(RESULTS)
        return latent_targets(*trace, self._num_latents, args.latent_ce_tokens, *steps)

    def _groups(self) -> tuple[int, int]:
        """The number of groups of latent tokens that stand for a step each, and that of latent tokens in each.

        Where they belong to no step, each is a group, and sequential ones have one more: what the next input would be.
        """
        count, per_step = self._num_latents, self.args.latents_per_step
        if per_step is not None:
            return count // per_step, per_step
        sequential = backbone_of(self.model).latent_config.iterations is None
        return count + sequential, 1

    def _steps(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """What the step decoder writes: (B, G, L), see `steps_of`. The last group stands for all steps left, unless the
        student writes these."""
        merge = self._stages is None or self._stage > self._stages.steps
        return steps_of(batch["teacher_ids"], batch[STEP_ENDS], self._groups()[0], self._eos, merge)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, mode = self.args, "train" if self.model.training else "eval"
        inputs = self._in_stage(inputs)
        whole = here = self._all_sum(self._counts(inputs, inputs["labels"].device))
        steps = 1
        if mode == "train" and num_items_in_batch is not None:
            whole, steps = num_items_in_batch.to(here.device), self.current_gradient_accumulation_steps
        shares = here / whole.clamp(min=1)
        share = dict(zip(COUNTED, shares[: len(COUNTED)], strict=True))
        with self.accelerator.autocast():
            passes = self._within_forward(model, self._passes, inputs)
        outputs, teacher, kept, latent_kv, length, read, written = passes
        terms = {
            "ce_student": (args.w_student, cross_entropy(outputs.logits, inputs["labels"], self._all_sum)),
        }
        if read is not None:
            terms["latent_ce"] = (args.w_latent_ce, read[0])
            self._metrics[mode]["latent/right_tokens"].append(read[1].item())
        if teacher is not None:
            labels = F.pad(inputs["teacher_labels"], (1, 0), value=-100)
            if args.w_teacher:
                terms["ce_teacher"] = (args.w_teacher, cross_entropy(teacher.logits, labels, self._all_sum))
            if args.w_codi:
                first = int(args.codi_skip_embeddings)
                distance = codi_loss(
                    _at(outputs.hidden_states[first:], inputs["student_at"]),
                    _at(teacher.hidden_states[first:], inputs["teacher_at"] + 1),
                    loss=args.codi_loss,
                    std_mode=args.codi_std_mode,
                    std_scope=args.codi_std_scope,
                    all_sum=self._all_sum,
                )
                terms["codi"] = (args.w_codi, distance)
        if kept:
            terms["kv"] = (args.w_kv, self._kv_distance(latent_kv, kept))
        if written is not None:  # a mean over the groups that have steps
            groups, share["step_decoder"] = (whole[len(COUNTED) :] > 0).sum().clamp(min=1), 1.0
            terms["step_decoder"] = (args.w_step_decoder, (written * shares[len(COUNTED) :]).sum() / groups)
        loss = sum(weight * share[name] * value for name, (weight, value) in terms.items() if weight)
        for name, (_, value) in terms.items():
            logged = (self.accelerator.gather(value.detach()).mean() * share[name] * steps).item()
            if not math.isfinite(logged):
                raise FloatingPointError(
                    f"loss/{name} is {logged} after {self.state.global_step} steps: the model's weights hold NaN, or "
                    "training diverged; earlier checkpoints are unchanged"
                )
            self._metrics[mode][f"loss/{name}"].append(logged)
        self._log_length(mode, length)
        # Without cache and hidden states, because evaluation with `compute_metrics` would gather them
        return (loss, type(outputs)(logits=outputs.logits)) if return_outputs else loss

    def _log_length(self, mode: str, length: torch.Tensor) -> None:
        """Log how long latent inputs are, and warn once if they are far from what the model has been trained to read."""
        ratio = self.accelerator.gather(length).mean().item()
        self._metrics[mode]["latent/norm_ratio"].append(ratio)
        if ratio > LONG and not self._warned_of_length:
            self._warned_of_length = True
            logger.warning(
                f"latent/norm_ratio is {ratio:.1f} after {self.state.global_step} steps: latent inputs are that many times "
                "as long as the model's embeddings, which it seldom learns to read; set projection_layer_norm=True with a "
                "projection_dim, or lower the learning rate"
            )

    def _passes(self, model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[Any, ...]:
        """Run all forwards of the loss.

        Returns:
            The student's output, the teacher's, the keys and values to keep of each layer, those of the latent tokens, the
            mean norm of the latent inputs over that of the embeddings, and what `latent_cross_entropy` and `step_losses`
            return; the second, third and last two are None if no loss needs them.
        """
        args, bare = self.args, unwrapped(model)  # DDP must see only the student's forward
        question = inputs["question_ids"], inputs["question_mask"]
        shared = None
        if question[0].shape[1] > 1 and (args.w_teacher or args.w_codi or args.w_kv):
            # Teacher and student share the pass over the question, except for its last token, whose prediction differs
            shared = prefill(bare, *(x[:, :-1] for x in question))
        teacher, kept = self._teacher(bare, inputs, None if shared is None else branch(shared))
        state = latent_phase(bare, *question, past_key_values=shared)
        latent_kv = state.latent_kv()  # before the answer extends the cache
        length = norm_ratio(bare, state)
        read = None
        if args.w_latent_ce:
            before = state.before if args.latent_ce_passes == "all" else state.before[-1:]
            targets = self._targets(inputs)
            read = latent_cross_entropy(partial(logits_of, causal_lm_of(bare)), before, targets, self._all_sum)
        decoder = self._step_decoder
        written = None if decoder is None else self._write_steps(decoder, bare, state, inputs)
        return self._student(model, state, inputs), teacher, kept, latent_kv, length, read, written

    def _write_steps(
        self, decoder: nn.Module, model: nn.Module, state: LatentState, inputs: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """The loss of the step decoder by group of latent tokens: (G,)."""
        backbone, (groups, size), latents = backbone_of(model), self._groups(), state.latents
        if groups * size > latents.shape[1]:
            latents = torch.cat([latents, project_latent(backbone, state.hidden_states[:, -1:])], dim=1)
        latents = latents.unflatten(1, (groups, size))
        decoder.train(backbone.training)
        return step_losses(decoder, backbone.get_input_embeddings(), latents, self._steps(inputs), self._all_sum)

    def _teacher(self, model: nn.Module, inputs: dict[str, torch.Tensor], cache: DynamicCache | None):
        """The teacher's pass over the question's last token, trace and answer.

        The cache holds the question before that token.

        Returns:
            The model's output, and the keys and values to keep of each layer; both None if no loss needs the teacher.
        """
        args = self.args
        if not (args.w_teacher or args.w_codi or args.w_kv):
            return None, None
        mask = torch.cat([inputs["question_mask"], inputs["teacher_mask"]], dim=1)
        ids = torch.cat([inputs["question_ids"][:, -1:], inputs["teacher_ids"]], dim=1)
        tap: contextlib.AbstractContextManager = contextlib.nullcontext()
        if args.w_kv:
            keys = F.pad(inputs["trace_mask"], (inputs["question_mask"].shape[1], 0))
            queries = F.pad(inputs["answer_mask"], (1, 0))
            tap = compressed_trace(model, keys, queries, self._num_latents, args.kv_scoring())
        with tap as kept:
            out = model(
                input_ids=ids,
                attention_mask=mask,
                position_ids=(mask.cumsum(-1) - 1)[:, -ids.shape[1] :],
                output_hidden_states=bool(args.w_codi),
                use_cache=cache is not None,
                **{CACHE: cache},
            )
        return out, kept

    def _student(self, model: nn.Module, state: LatentState, inputs: dict[str, torch.Tensor]) -> Any:
        """The student's pass over <eot> and the answer, with the cache of the latent tokens."""
        mask = torch.cat([state.attention_mask, inputs["attention_mask"]], dim=1)
        return model(
            input_ids=inputs["input_ids"],
            attention_mask=mask,
            position_ids=(mask.cumsum(-1) - 1)[:, -inputs["input_ids"].shape[1] :],
            use_cache=True,
            output_hidden_states=bool(self.args.w_codi),
            **{CACHE: state.cache},
        )

    def _kv_distance(self, latent_kv: list[tuple[torch.Tensor, torch.Tensor]], kept: list) -> torch.Tensor:
        keys, values = (torch.stack(x) for x in zip(*latent_kv, strict=True))
        if self._prepared.settings.kv_projection:
            keys, values = backbone_of(self.model).latent_kv_projection(keys, values)
        pairs = ((keys, [layer.keys for layer in kept]), (values, [layer.values for layer in kept]))
        distances = [
            kv_loss(
                ours,
                torch.stack(theirs),
                kept[0].valid,
                loss=self.args.kv_loss,
                std_mode=self.args.kv_std_mode,
                all_sum=self._all_sum,
            )
            for ours, theirs in pairs
        ]
        return sum(distances) / 2

    # -- optimizer and checkpoints of the step decoder ----------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if self._step_decoder is not None:
            self._train_beside(optimizer, parameter_groups(self, self._step_decoder))
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self._step_decoder is not None and self.accelerator.sync_gradients:
            self._end_step_beside(self._step_decoder.parameters(), self.args.max_grad_norm)
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        if self._step_decoder is None or self._sharded():
            return super()._clip_grad_norm(model)
        both = itertools.chain(model.parameters(), self._step_decoder.parameters())  # one norm, as in the official code
        return self.accelerator.clip_grad_norm_(list(both), self.args.max_grad_norm)

    def _modules_beside(self) -> dict[str, nn.Module]:
        beside = super()._modules_beside()
        return beside if self._step_decoder is None else {**beside, STEP_DECODER: self._step_decoder}

    def _all_sum(self, x: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(x, "sum")


def forget_moments(optimizer: Any) -> None:
    """Empty the state of an optimizer, wrapped by accelerate or not, as a new one has it. Rates stay."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    optimizer.state.clear()


def _at(hidden_states: tuple[torch.Tensor, ...], positions: torch.Tensor) -> torch.Tensor:
    """(L, B, d): the state at one position per row, of every layer's (B, T, d)."""
    rows = torch.arange(len(positions), device=positions.device)
    return torch.stack([hidden[rows, positions] for hidden in hidden_states])


def _shuffled(dataset: Any, args: LatentArguments) -> Any:
    """Shuffle a dataset as TRL's own preparation does."""
    return dataset.shuffle(seed=args.seed) if args.shuffle_dataset else dataset
