"""SFT of a student whose keys, values and attention follow those of a teacher of another shape.

The differences from SFT: `_prepare_dataset` marks prompt, reasoning and answer. `compute_loss` adds the structural
loss. The projection between the two models is part of the optimizer and of checkpoints. With `lambda_kv=0` the trainer
equals SFT.
"""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging
from trl import SFTTrainer

from unsloth_ext.common.attention_tap import check_look
from unsloth_ext.common.layer_kinds import check_layers
from unsloth_ext.common.unsloth_decoding import on_unsloth
from unsloth_ext.kv_distill.aligner import MapProjectionAligner
from unsloth_ext.kv_distill.capture import captured_kvq, stacked

from ..common.checkpointing import CheckpointError, SafeCheckpointMixin
from ..common.engines import check_engine
from ..common.model_loading import check_left, check_name, default_args, with_adapter
from ..common.modules_beside import from_first_process
from ..common.teacher import check_vocabularies, for_teacher, load_teacher, shard_teacher
from ..common.update_sizes import UpdateSizesMixin
from .config import KVDistillConfig
from .segments import TEACHER, SegmentCollator, add_segments
from .teacher_text import TEXTS, prepare_both


logger = logging.get_logger(__name__)

ALIGNER = "aligner"
FALLEN = (
    0.7  # share of the initial spread. On the embedded default, a student that learns nothing has its target at 0.6
)


class KVDistillTrainer(UpdateSizesMixin, SafeCheckpointMixin, SFTTrainer):
    """SFT plus a structural loss on keys, values and attention of a teacher. Ours.

    Rows may have another text for the teacher in `teacher_prompt` or `teacher_completion` or both, such as longer
    reasoning to the same answer. Its segments are resampled to the lengths of the student's.

    Args:
        model: the student, or its name.
        args: the configuration; None: the defaults.
        *others: further arguments of `SFTTrainer`.
        teacher_model: a model, or its hub id or folder; None: `args.teacher_model_name_or_path`.
        teacher_processing_class: the teacher's tokenizer; None: the one in its folder, if there is one.
        **keywords: further arguments of `SFTTrainer`.

    Attributes:
        teacher: frozen, in its own dtype and, with a device map, on its own devices.
        aligner: the `MapProjectionAligner` between the two.

    Raises:
        ValueError: in the constructor, for a missing teacher or one with another vocabulary, attention other than SDPA,
            or rows without segments.
    """

    _tag_names = ["trl", "kv-distillation"]
    _name = "KV distillation"

    def __init__(
        self,
        model: Any,
        args: KVDistillConfig | None = None,
        *others: Any,
        teacher_model: PreTrainedModel | str | None = None,
        teacher_processing_class: PreTrainedTokenizerBase | None = None,
        **keywords: Any,
    ):
        args = default_args(model, KVDistillConfig, self._name) if args is None else args
        if not isinstance(args, KVDistillConfig):
            raise ValueError(f"args is a {type(args).__name__}; KV distillation needs a KVDistillConfig")
        teacher_model = teacher_model if teacher_model is not None else args.teacher_model_name_or_path
        if args.lambda_kv and teacher_model is None:
            raise ValueError("teacher_model: pass a teacher, set teacher_model_name_or_path, or set lambda_kv=0")
        peft_config = keywords.get("peft_config")
        if args.lambda_kv and peft_config is not None and peft_config.is_prompt_learning:
            raise ValueError(
                f"{type(peft_config).__name__} adds virtual tokens, for which the teacher has no keys; use LoRA"
            )
        if args.lambda_kv:
            check_engine(args, self._name, {"fp16=True": args.fp16 and not args.freeze_aligner})
        check_name(model)
        model, keywords["peft_config"] = with_adapter(model, peft_config, args.seed)
        if args.lambda_kv and args.n_gpu > 1:
            # Disable nn.DataParallel: nothing can be captured in its replicas. The teacher may use the other GPUs
            args._n_gpu = 1
        super().__init__(model, args, *others, **keywords)
        self.aligner = self.teacher = None
        if not args.lambda_kv:
            return
        self.data_collator: Any = SegmentCollator(self.data_collator)
        self.teacher = load_teacher(
            teacher_model, args.teacher_model_init_kwargs, args.trust_remote_code, self.accelerator.device
        )
        check_vocabularies(self._tokenizer, self.teacher, teacher_processing_class)
        self._check_positions(self.teacher)
        for side in (self.model, self.teacher):
            if on_unsloth(side):
                raise ValueError(
                    "the model runs Unsloth's fast forwards, which do not expose keys and values: load it with "
                    "AutoModelForCausalLM"
                )
            check_layers(side, f"lambda_kv={args.lambda_kv}", args.max_length)
            check_look(side, f"lambda_kv={args.lambda_kv}")
        with torch.random.fork_rng():
            torch.manual_seed(args.seed)
            self.aligner = MapProjectionAligner(
                self.teacher.config,
                self.model.config,
                args.kv_projection_mode,
                args.kv_direction,
                args.layer_map(),
                args.share_dim_proj,
                args.init_uniform,
                args.kv_init,
                args.rope_space,
                args.time_warper(),
                args.freeze_aligner,
            ).to(self.accelerator.device)
        self.teacher = shard_teacher(self.teacher, self.accelerator)
        self._structural_loss = args.structural_loss()
        self._first_spread: dict[str, float] = {}

    # -- data -------------------------------------------------------------------------------------------------------

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        parents = super()._prepare_dataset
        if not args.lambda_kv:
            return parents(dataset, processing_class, args, packing, formatting_func, dataset_name)

        def prepare(dataset, name):
            dataset = parents(dataset, processing_class, args, packing, formatting_func, name)
            check_left(dataset, f"{name} dataset", args.max_length)
            return add_segments(dataset, name, self._tokenizer, args.answer_delimiter)

        both = set(TEXTS) & set(dataset.column_names or ())
        return prepare_both(dataset, dataset_name, prepare) if both else prepare(dataset, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self.args.lambda_kv and "segment_ids" not in self._signature_columns:
            self._signature_columns += ["segment_ids", "teacher_input_ids", "teacher_segment_ids"]

    # -- loss -------------------------------------------------------------------------------------------------------

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.args.lambda_kv:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        mode = "train" if self.model.training else "eval"
        theirs = {k.removeprefix(TEACHER): x for k, x in inputs.items() if k.startswith(TEACHER)}
        inputs = {k: x for k, x in inputs.items() if not k.startswith(TEACHER)}
        segments = inputs.pop("segment_ids")
        both = segments, theirs.get("segment_ids")  # second is None if the teacher reads the student's text
        with captured_kvq(self.model) as student:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss, outputs = result if return_outputs else (result, None)
        structural, metrics = self._structural(student, self._teacher_kvq(theirs or inputs), both)
        share, steps = 1.0, 1
        if (
            mode == "train" and num_items_in_batch is not None
        ):  # cross-entropy is then scaled as a part of the whole step
            share, steps = self._share_of_step(segments), self.current_gradient_accumulation_steps
        for name, value in metrics.items():
            value = value if name.startswith("target") else value * share * steps
            self._metrics[mode][f"kv/{name}"].append(self.accelerator.gather(value).mean().item())
        if mode == "train":
            self._watch_target()
        self._metrics[mode]["loss/ce"].append(self.accelerator.gather(loss.detach()).mean().item() * steps)
        loss = loss + self.args.lambda_kv * share * structural
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.aligner is not None:  # Trainer clears only the model's gradients, and a loss scaler may skip the step
            self.aligner.zero_grad()
        if self.args.lambda_kv and samples:
            times = sum(self._times(batch["segment_ids"].to(device)) for batch in samples)
            self._step_times = self.accelerator.gather(times).sum() if self._across_processes() else times
        return samples, items

    def _share_of_step(self, segments: torch.Tensor) -> torch.Tensor:
        """This micro-batch's share of the points compared in a step, scaled for the mean over processes."""
        processes = self.accelerator.num_processes if self._across_processes() else 1
        return self._times(segments) * processes / self._step_times

    def _times(self, segments: torch.Tensor) -> torch.Tensor:
        return (self.aligner.compared(segments, self.args.T_s) >= 0).sum()

    def _across_processes(self) -> bool:
        return self.args.average_tokens_across_devices and self.accelerator.num_processes > 1

    @torch.no_grad()
    def _teacher_kvq(self, inputs: dict[str, torch.Tensor]) -> dict[int, tuple[torch.Tensor, ...]]:
        here = inputs["input_ids"].device
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        # A forward that is left half-way would leave gathered weights behind
        with captured_kvq(self.teacher, self.aligner.layers, stop=not self._sharded()) as found:
            self.teacher(**for_teacher(self.teacher, inputs, here), use_cache=False)
        return {layer: tuple(x.to(here) for x in kvq) for layer, kvq in found.items()}

    def _structural(
        self, student: dict, teacher: dict, segments: tuple
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The structural loss and its terms, averaged over layers."""
        if not self.aligner.fitted:
            self._fit(student, teacher, segments)
        layer_loss = self._layer_loss
        if self.args.gradient_checkpointing:
            layer_loss = functools.partial(checkpoint, self._layer_loss, use_reentrant=False)
        terms = [layer_loss(student[i], teacher[layer], segments) for i, layer in enumerate(self.aligner.layers)]
        loss = sum(value for value, _ in terms) / len(terms)
        metrics = {name: torch.stack([m[name] for _, m in terms]).mean() for name in terms[0][1]}
        return loss, {**metrics, "loss": loss.detach()}

    def _layer_loss(self, student: tuple, teacher: tuple, segments: tuple):
        ours, theirs = (tuple(x[:, None] for x in side) for side in (student, teacher))
        s, t, mask = self.aligner.pairs(ours, theirs, *segments, T_s=self.args.T_s)
        return self._structural_loss(*s, *t, mask)  # type: ignore[call-arg]  # three tensors per side

    @torch.no_grad()
    def _fit(self, student: dict, teacher: dict, segments: tuple) -> None:
        layers = self.aligner.layers
        self.aligner.fit(stacked(student, range(len(layers))), stacked(teacher, layers), *segments, T_s=self.args.T_s)
        from_first_process(self.aligner.parameters())  # each process has fitted on another batch

    def _watch_target(self) -> None:
        """Warn once if a trained target loses its spread."""
        if self.aligner.projects_student or self.args.freeze_aligner:
            return
        for name in ("target_std_k", "target_std_v", "target_rank_k", "target_rank_v"):
            now = self._metrics["train"][f"kv/{name}"][-1]
            first = self._first_spread.setdefault(name, now)
            if now < FALLEN * first:
                self._first_spread[name] = 0.0  # warn only once
                logger.warning(
                    f"kv/{name} fell from {first:.3g} to {now:.3g}: the projected teacher is collapsing; use "
                    "kv_direction='student_to_teacher' or freeze_aligner=True"
                )

    # -- optimizer and checkpoints of the projection ----------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        if learning := self._learning():
            rate = self.args.aligner_learning_rate
            rate = self.args.learning_rate if rate is None else rate
            self._train_beside(optimizer, [{"params": learning, "lr": rate, "weight_decay": 0.0}])
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        loss = super().training_step(*args, **kwargs)
        if self.accelerator.sync_gradients and (learning := self._learning()):
            self._end_step_beside(learning)
        return loss

    def _learning(self) -> list[nn.Parameter]:
        """The parameters of the projection that are trained."""
        return [] if self.aligner is None else [p for p in self.aligner.parameters() if p.requires_grad]

    def _modules_beside(self) -> dict[str, nn.Module]:
        return {} if self.aligner is None else {ALIGNER: self.aligner}

    def _check_beside(self, checkpoint: Path) -> None:
        if self.aligner is None:
            return
        try:
            saved = MapProjectionAligner.from_pretrained(checkpoint / ALIGNER)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
        theirs = saved.to_dict()
        for name, value in self.aligner.to_dict().items():
            if theirs[name] != value:
                raise CheckpointError(f"{checkpoint / ALIGNER} has {name}={theirs[name]!r}, this run {value!r}")
        super()._check_beside(checkpoint)
