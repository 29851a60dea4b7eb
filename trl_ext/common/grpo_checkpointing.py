"""Checkpointing for GRPO trainers: the position in the generation cycle, the rollouts, and a moving reference model.

TRL counts micro-steps from 0 and keeps rollouts only in memory, so a run resumed inside a cycle would generate new
ones. Therefore each rank writes `rollout_<rank>.safetensors` with its JSON. The sampler shuffles with its own
generator, which starts at the order of the first epoch. A reference model that follows the policy (`sync_ref_model`) is
saved in `ref_model/`. A fixed reference is the model that the run started with, and only its checksum is saved. The
reference of a `PeftModel` is one of its adapters and is saved with the others.
"""

import json
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch.utils.data import Sampler
from transformers.utils import logging
from trl.trainer.utils import RepeatSampler

from patches import completions_table
from unsloth_ext.common.settings_file import safetensors_keys

from .checkpointing import OPTIMIZER, ROLLOUT, SafeCheckpointMixin
from .model_loading import name_of
from .saved_weights import CheckpointError, check_finite, check_weights, checksum, load_weights
from .update_sizes import UpdateSizesMixin


logger = logging.get_logger(__name__)

REFERENCE = "ref_model"


class GRPOCheckpointMixin(UpdateSizesMixin, SafeCheckpointMixin):
    """Checkpoint and resume a GRPO run exactly. Put it before a `GRPOTrainer`.

    Attributes:
        _unknown_as_nan: tensors of a rollout in which NaN means that a value is not known.
    """

    _train_sampler: Sampler | None = None
    _reference: str | None = None
    _unknown_as_nan: tuple[str, ...] = ("sampling_per_token_logps",)  # vLLM's

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if self.args.log_completions:
            completions_table.ensure()
        prompts = self.args.generation_batch_size // self.num_generations
        if isinstance(self.train_dataset, Dataset) and len(self.train_dataset) < prompts:  # GRPO would train no step
            raise ValueError(
                f"train_dataset has {len(self.train_dataset)} rows, but a rollout needs {prompts} different ones "
                "(generation_batch_size / num_generations); give more rows or a smaller rollout"
            )

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        self._train_sampler = super()._get_train_sampler(dataset)
        return self._train_sampler

    def _init_training_state(self, *args: Any, **kwargs: Any) -> tuple[int, int]:
        epochs, steps = super()._init_training_state(*args, **kwargs)
        if isinstance(self._train_sampler, RepeatSampler):
            for _ in range(epochs):
                next(iter(self._train_sampler), None)  # draws the order of one epoch
        return epochs, steps

    def _moving_reference(self) -> Any:
        return self.accelerator.unwrap_model(self.ref_model) if self.args.sync_ref_model else None

    def _check_checkpoint(self, checkpoint: Path) -> None:
        super()._check_checkpoint(checkpoint)
        if (checkpoint / OPTIMIZER[0]).exists() and not (checkpoint / ROLLOUT[1]).exists():
            raise CheckpointError(f"{checkpoint / ROLLOUT[1]} is missing: the position in the rollouts would be lost")
        saved = sorted(checkpoint.glob("rollout_*.json"))
        inside = any(json.loads(file.read_text())["batches"] for file in saved)
        if saved and inside and len(saved) != self.accelerator.num_processes:
            raise CheckpointError(
                f"{checkpoint} was saved by {len(saved)} process(es) between two steps of one rollout, which cannot be "
                f"split for {self.accelerator.num_processes}: resume with {len(saved)}, or from a checkpoint that was "
                "saved after the last step of a rollout"
            )
        for file in sorted(checkpoint.glob("rollout_*.safetensors")):
            names = set(safetensors_keys(file))
            check_finite([file], names, {name for name in names if name.endswith(self._unknown_as_nan)})
        if self._moving_reference() is None:
            self._compare_reference(checkpoint / ROLLOUT[1])
            return
        if self._sharded():
            raise CheckpointError(
                "sync_ref_model=True: checkpoints of DeepSpeed and FSDP do not hold the moving reference model; "
                "start a new run from the saved model, or set sync_ref_model=False"
            )
        check_weights(self._moving_reference(), checkpoint / REFERENCE)

    def _compare_reference(self, file: Path) -> None:
        """Warn if a fixed reference differs from the one before: TRL loads it by the name of the policy."""
        before = json.loads(file.read_text()).get("reference") if file.exists() else None
        if before is not None and self._reference_sum() not in (None, before):
            logger.warning(
                f"{file.parent} was trained with another reference model (beta={self.beta}) than {name_of(self.model)}, "
                "which is loaded now: resume with the model that the run started with; its weights are then replaced"
            )

    def _reference_sum(self) -> str | None:
        """A checksum of a fixed reference model that is in memory; None if there is none."""
        if self.ref_model is None or self.args.sync_ref_model or self._sharded():
            return None
        if self._reference is None:
            self._reference = checksum(self.accelerator.unwrap_model(self.ref_model))
        return self._reference

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        Path(output_dir).mkdir(parents=True, exist_ok=True)  # rank 0 may not have made it yet
        if self._moving_reference() is not None and not self._sharded() and self.args.should_save:
            self._moving_reference().save_pretrained(Path(output_dir, REFERENCE))
        rank = self.args.process_index
        tensors: dict[str, torch.Tensor] = {}
        plain = {"step": self._step, "batches": 0, "reference": self._reference_sum()}
        if self._step % (self.args.steps_per_generation * self.num_iterations):
            plain["batches"] = len(self._buffered_inputs)
            for i, batch in enumerate(self._buffered_inputs):
                for key, value in batch.items():
                    (tensors if isinstance(value, torch.Tensor) else plain)[f"{i}.{key}"] = value
        # Batches share some scalars, and safetensors refuses tensors that share memory
        save_file({k: v.clone() for k, v in tensors.items()}, Path(output_dir, f"rollout_{rank}.safetensors"))
        Path(output_dir, f"rollout_{rank}.json").write_text(json.dumps(plain))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._moving_reference() is not None:
            load_weights(self._moving_reference(), Path(checkpoint, REFERENCE))
        file = Path(checkpoint or "", f"rollout_{self.args.process_index}.json")
        if checkpoint is not None and not file.exists():  # more processes than before: all were at the same place
            file = Path(checkpoint, ROLLOUT[1])
        if checkpoint is None or not file.exists():
            return
        plain = json.loads(file.read_text())
        plain.pop("reference", None)
        self._step = plain.pop("step")
        batches: list[dict[str, Any]] = [{} for _ in range(plain.pop("batches"))]
        for name, value in {**plain, **load_file(file.with_suffix(".safetensors"))}.items():
            index, _, key = name.partition(".")
            batches[int(index)][key] = value.to(self.args.device) if isinstance(value, torch.Tensor) else value
        self._buffered_inputs = batches or None
