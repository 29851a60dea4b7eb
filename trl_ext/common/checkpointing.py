"""Checkpoints without pickle that resume exactly: a mixin for any `transformers.Trainer`.

Besides the model, a checkpoint holds `optimizer.safetensors` (state by parameter *name*) with `optimizer.json`,
`scheduler.json`, `rng_state_<rank>.safetensors` with its JSON, and `trainer_state.json`. The last one is written last:
a folder without it belongs to a process that died while saving. transformers' own files (optimizer.pt, scheduler.pt,
rng_state.pth, scaler.pt, training_args.bin) are pickles. They are never written, and read only if the user allows it by
name.

transformers saves some models, above all mixtures of experts, in another form than it trains them. They are read with
`from_pretrained`, because Trainer would skip the tensors whose names it does not know.

FSDP2 and DeepSpeed shard the optimizer. Its state is gathered for the checkpoint, which has the same format on every engine
and for any number of processes. FSDP1, and DeepSpeed with state on a disk, write their own formats, which are pickles.

On resume, the learning rates of the command line are used: only the position of the scheduler is restored. Schedules
that follow a metric keep the rates that they have reached. New parameters get fresh optimizer state, and the state of
removed parameters is dropped.
"""

import inspect
import itertools
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length
from transformers.utils import logging

from patches import fused_lm_head
from unsloth_ext.common.sharding import changing_weights, full

from . import zero_state
from .engines import check_optimizer, check_torch
from .model_card import complete_run_card, read_card, write_card_of
from .model_loading import (
    check_arguments,
    check_left,
    check_model_and_tokenizer,
    check_positions,
    check_reference,
    give_head_a_bias,
    preparing_models,
)
from .modules_beside import ModulesBesideMixin
from .run_folder import checkpoints, run_id, stamp
from .saved_weights import CheckpointError, check_finite, check_weights, load_weights, warn_of_another_origin
from .trainable_parameters import check_trainable


logger = logging.get_logger(__name__)

STATE_FILE = "trainer_state.json"
# File sets that must be complete or absent (FSDP and DeepSpeed write their own optimizer files), and the keys they need
OPTIMIZER = ("optimizer.safetensors", "optimizer.json", "scheduler.json")
RNG = ("rng_state_0.safetensors", "rng_state_0.json")
ROLLOUT = ("rollout_0.safetensors", "rollout_0.json")  # of trainers that generate rollouts
NEEDED = {STATE_FILE: ("global_step",), "scheduler.json": ("last_epoch",), RNG[1]: ("python", "numpy")}
PICKLES = (".pt", ".pth", ".bin", ".pkl", ".distcp")  # FSDP writes .distcp files with a pickle beside them


def broken_file(checkpoint: Path) -> str | None:
    """One sentence that says why `checkpoint` cannot be resumed and names the file; None if it is complete."""
    if not (checkpoint / STATE_FILE).is_file():
        return f"{checkpoint / STATE_FILE} is missing: the checkpoint was never finished"
    here = {file.name for file in checkpoint.iterdir()}
    for some, together in ((OPTIMIZER, OPTIMIZER + RNG), (RNG, RNG), (ROLLOUT, ROLLOUT)):
        lost = [name for name in together if name not in here]
        if lost and here & set(some):
            return f"{checkpoint / lost[0]} is missing"
    for file in sorted(checkpoint.glob("*.json")):
        try:
            found = json.loads(file.read_text())
        except ValueError as error:
            return f"{file} is not complete JSON ({error}): the checkpoint was never finished"
        lacks = [key for key in NEEDED.get(file.name, ()) if not isinstance(found, dict) or key not in found]
        if lacks:
            return f"{file} has no {lacks[0]!r}"
    for file in sorted(checkpoint.glob("**/*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            return f"{file} is truncated or damaged ({error})"
    return None


def last_complete_checkpoint(output_dir: str | Path) -> Path | None:
    """The newest complete `checkpoint-<step>` folder of the run in `output_dir`. Skipped checkpoints are logged with
    the reason."""
    run = run_id(output_dir)
    for _, path in reversed(checkpoints(Path(output_dir))):
        problem = broken_file(path)
        if problem is None and run is not None and (other := run_id(path)) != run:
            problem = f"it belongs to run {other}, but the folder holds run {run}"
        if problem is None:
            return path
        logger.warning(f"Skipping {path}: {problem}")
    return None


def no_steps_left(step: int, of: int) -> str:
    """The message for a checkpoint that is already at the end of its run."""
    return (
        f"no steps left: the checkpoint is at step {step} of {of}. Ask for more with max_steps or "
        "num_train_epochs, on the same schedule"
    )


class SafeCheckpointMixin(ModulesBesideMixin):
    """Save and resume without pickle. Put it before a Trainer class.

    Reads `args.allow_pickle_checkpoint` if the configuration has this field.

    Raises:
        ValueError: in the constructor, if nothing of the model would be trained, if its adapter is frozen, or if TRL
            could not derive the reference model from its adapter.
    """

    _only_in_checkpoints: tuple[str, ...] = ()
    """The names of those modules beside the model that a saved model does not have."""

    _latent_method: str | None = None
    """The latent reasoning method whose modules the trainer attaches. Folders of another method are refused."""

    def __init__(self, *args: Any, **kwargs: Any):
        fused_lm_head.ensure()  # TRL's trainers need it on machines where Triton finds no GPU
        named = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        named = {**named, **named.get("kwargs", {})}
        check_arguments(named)
        check_torch(named.get("args"))
        check_optimizer(named.get("args"))
        check_reference(named)
        check_model_and_tokenizer(named.get("model"), named.get("processing_class"), self._latent_method)
        with preparing_models(self._stock_init, policy=named.get("model")):
            super().__init__(*args, **kwargs)
        check_trainable(self.model)
        give_head_a_bias(self.model)
        check_left(self.train_dataset, "train_dataset", getattr(self.args, "max_length", None))
        self._check_positions(self.accelerator.unwrap_model(self.model))

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, checkpoint: str | None) -> Any:
        if self.args.world_size > 1 and self.model_wrapped is self.model and not self._sharded():
            # If an evaluation came first, transformers has prepared the model without DDP, and accelerate would not prepare
            # it again: each process would train its copy by itself
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)._is_accelerate_prepared = False
        if checkpoint is None or not (self._sharded() and self._own_format() and _holds_our_state(checkpoint)):
            return super()._prepare_for_training(max_steps, train_dataloader, checkpoint)
        self._load_all(Path(checkpoint))  # before the weights are split
        made = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_optimizer_and_scheduler(checkpoint)
        return made

    def _check_positions(self, model: torch.nn.Module) -> None:
        for name in ("train_dataset", "eval_dataset"):
            check_positions(model, getattr(self, name), name, getattr(self.args, "packing", False))

    @property
    def _stock_init(self) -> Callable[..., None]:
        """The constructor of the trainer that this mixin was put before."""
        return super().__init__

    def _modules_in(self, folder: Path) -> dict[str, torch.nn.Module]:
        """The modules beside the model that belong into a folder."""
        left_out = () if folder.name.startswith(PREFIX_CHECKPOINT_DIR) else self._only_in_checkpoints
        return {name: module for name, module in self._modules_beside().items() if name not in left_out}

    # -- which checkpoint -------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        if self.is_deepspeed_enabled and self.model_wrapped is not self.model:  # accelerate has lost its engine
            raise RuntimeError(
                "with DeepSpeed a trainer trains once; make another one, which may begin with a checkpoint"
            )
        if resume_from_checkpoint is True:
            found = last_complete_checkpoint(self.args.output_dir)
            if found is None:
                raise CheckpointError(f"no complete checkpoint in {self.args.output_dir} to resume from")
            resume_from_checkpoint = str(found)
        if resume_from_checkpoint:
            self._check_checkpoint(Path(resume_from_checkpoint))
        return super().train(resume_from_checkpoint or None, *args, **kwargs)

    def get_train_dataloader(self) -> Any:
        loader = super().get_train_dataloader()
        if has_length(loader) and not len(loader):  # Trainer would end at step 0, with a warning
            raise ValueError(
                f"train_dataset has {len(self.train_dataset)} row(s). With dataloader_drop_last="
                f"{self.args.dataloader_drop_last} they do not fill one batch of {self._train_batch_size}; give more rows "
                "or a smaller batch"
            )
        return loader

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        try:
            return super().create_scheduler(num_training_steps, optimizer)
        except TypeError as error:  # the schedule does not take these arguments
            raise ValueError(
                f"lr_scheduler_kwargs={self.args.lr_scheduler_kwargs} do not fit lr_scheduler_type="
                f"{getattr(self.args.lr_scheduler_type, 'value', self.args.lr_scheduler_type)}: {error}"
            ) from error

    def begin_with(self, folder: str | Path) -> None:
        """Load the weights of a checkpoint or a saved model. Training still starts at step 0 with a new optimizer and
        schedule.

        Raises:
            CheckpointError: there is no such folder, or it belongs to another model.
        """
        if not Path(folder).is_dir():
            raise CheckpointError(f"init_from={folder}: there is no such folder")
        if self._own_format():
            check_weights(self.model, Path(folder))
            self._check_beside(Path(folder))
            warn_of_another_origin(self.model, Path(folder))
            self._load_all(Path(folder))
        else:
            self._load_from_checkpoint(str(folder))

    def _init_training_state(self, max_steps: int, *args: Any, **kwargs: Any) -> Any:
        made = super()._init_training_state(max_steps, *args, **kwargs)
        if self.state.global_step >= max_steps > 0:  # Trainer checks the number of steps only after a step
            raise CheckpointError(no_steps_left(self.state.global_step, max_steps))
        return made

    def _check_checkpoint(self, checkpoint: Path) -> None:
        if not checkpoint.is_dir():
            raise CheckpointError(f"resume_from_checkpoint={checkpoint}: there is no such folder")
        problem = broken_file(checkpoint)
        if problem:
            raise CheckpointError(problem)
        files = (file for file in checkpoint.rglob("*") if file.suffix in PICKLES)
        pickles = sorted(file.name for file in files if file.name != "training_args.bin")  # resuming never reads it
        if pickles and not self._pickle_allowed():
            raise CheckpointError(
                f"{checkpoint} holds pickled state ({', '.join(pickles)}), which can run code when it is loaded; set "
                "allow_pickle_checkpoint=True if you trust its source"
            )
        if not self._own_format():
            return
        check_weights(self.model, checkpoint)
        self._check_beside(checkpoint)
        warn_of_another_origin(self.model, checkpoint)
        step = json.loads((checkpoint / STATE_FILE).read_text())["global_step"]
        # Trainer would silently start both from scratch
        if step and not pickles and not (checkpoint / OPTIMIZER[0]).exists():
            raise CheckpointError(
                f"{checkpoint} has no {OPTIMIZER[0]} (was it saved with save_only_model=True?): it holds neither the "
                "optimizer nor the schedule; start a new run with its weights"
            )
        self._check_kinds(checkpoint)
        check_finite([file for file in [checkpoint / OPTIMIZER[0]] if file.exists()])
        for file in (checkpoint / name for name in ("optimizer.json", "scheduler.json", "scaler.json")):
            if file.exists():
                _check_numbers(file)

    def _check_kinds(self, checkpoint: Path) -> None:
        """Check that optimizer and schedule are of the kind whose state was saved."""
        file = checkpoint / "training_args.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        here = json.loads(self.args.to_json_string())
        for name, kind in (("optim", _state_of), ("lr_scheduler_type", _metric_of)):
            if name in before and kind(before[name]) != kind(here[name]):
                raise CheckpointError(
                    f"{checkpoint} has the state of {name}={before[name]!r}, which {here[name]!r} cannot use: "
                    "resume with the former, or start a new run with the checkpoint's weights"
                )

    def _check_beside(self, checkpoint: Path) -> None:
        for name, module in self._modules_in(checkpoint).items():
            check_weights(module, checkpoint / name)

    def _pickle_allowed(self) -> bool:
        return getattr(self.args, "allow_pickle_checkpoint", False)

    def _own_format(self) -> bool:
        """Whether optimizer state is saved in our format. FSDP1, and DeepSpeed with state on a disk, use their own."""
        if self.is_deepspeed_enabled:
            made = getattr(self.optimizer, "optimizer", None)
            return made is None or zero_state.flat_parts(made) is not None
        return not self.is_fsdp_enabled or self.accelerator.is_fsdp2

    # -- saving -----------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
        if self.args.should_save:  # an older folder must not look complete while it is overwritten
            (folder / STATE_FILE).unlink(missing_ok=True)
            if (run := run_id(self.args.output_dir)) is not None:
                stamp(folder, run)
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        kept = read_card(folder)
        super()._save(output_dir, state_dict)
        if not self.args.should_save:  # since transformers 5.23 every process comes here
            return
        write_card_of(self, folder, kept)
        for name, module in self._modules_in(folder).items():
            module.save_pretrained(folder / name)
        (folder / "training_args.bin").unlink(missing_ok=True)
        (folder / "training_args.json").write_text(self.args.to_json_string() + "\n")

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        before = read_card(self.args.output_dir)
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            self._run_card = complete_run_card(self, before, getattr(self, "_run_card", None))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._own_format():
            super()._save_optimizer_and_scheduler(output_dir)
            return
        tensors, plain, written = {}, {}, set()
        for name, state in self._named_state().items():
            for key, value in state.items():
                if isinstance(value, torch.Tensor):
                    value = value.detach().contiguous()
                    # safetensors stores no memory twice, and 8-bit optimizers share one table between all parameters
                    shared = value.untyped_storage().data_ptr() in written
                    tensors[f"{name}|{key}"] = value = value.clone() if shared else value
                    written.add(value.untyped_storage().data_ptr())
                else:
                    plain[f"{name}|{key}"] = value
        if not self.args.should_save:
            return
        save_file(tensors, Path(output_dir, "optimizer.safetensors"))
        _write_json(Path(output_dir, "optimizer.json"), plain)
        scheduler = {k: v for k, v in self.lr_scheduler.state_dict().items() if k != "lr_lambdas"}
        _write_json(Path(output_dir, "scheduler.json"), scheduler)

    def _named_state(self) -> dict[str, dict[str, Any]]:
        """The optimizer state of each parameter that has some, by name; empty in processes that save nothing.

        Sharded state is gathered, one parameter after the other. All processes have to call it.
        """
        named = self._named_trained()
        found: dict[str, dict[str, Any]] = {}
        if self.is_deepspeed_enabled:
            for name, state in zero_state.whole_state(self._torch_optimizer(), named):
                found |= {name: state} if self.args.should_save else {}
        for optimizer in self._torch_optimizers():
            for name, parameter in named.items():
                state = {key: _gathered(value) for key, value in optimizer.state.get(parameter, {}).items()}
                found |= {name: state} if state and self.args.should_save else {}
        return found

    def _named_trained(self) -> dict[str, torch.nn.Parameter]:
        """All parameters that the optimizer may hold, by name."""
        beside = (module.named_parameters(prefix=name) for name, module in self._modules_beside().items())
        return dict(itertools.chain(self.model.named_parameters(), *beside))

    def _torch_optimizer(self) -> torch.optim.Optimizer:
        return getattr(self.optimizer, "optimizer", self.optimizer)  # unwrapped from accelerate

    def _torch_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers whose state is by parameter: not DeepSpeed's."""
        own = [] if self.is_deepspeed_enabled else [self._torch_optimizer()]
        return own + ([] if self._optimizer_beside is None else [self._optimizer_beside.optimizer])

    def _save_rng_state(self, output_dir: str) -> None:
        version, internal, gauss = random.getstate()
        state: Any = np.random.get_state()
        kind, keys, pos, has_gauss, cached = state
        plain = {
            "python": [version, list(internal), gauss],
            "numpy": [kind, keys.tolist(), pos, has_gauss, cached],
        }
        tensors = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors |= {f"cuda.{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        rank = self.args.process_index
        save_file(tensors, Path(output_dir, f"rng_state_{rank}.safetensors"))
        _write_json(Path(output_dir, f"rng_state_{rank}.json"), plain)
        self.accelerator.wait_for_everyone()  # rank 0 now writes trainer_state.json, which marks it complete

    def _save_scaler(self, output_dir: str) -> None:
        if self.accelerator.scaler is not None and self.args.should_save:
            _write_json(Path(output_dir, "scaler.json"), self.accelerator.scaler.state_dict())

    # -- loading ----------------------------------------------------------------------------------------------------

    # transformers 5.17: Trainer loads adapters in sub-folders *instead of* the folder's own (TRL's "ref" in place of the
    # trained one), skips tensors whose names it does not know, and verifies nothing afterwards

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        if self._own_format() and not self._sharded():
            self._load_all(Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._own_format():
            self._load_all(Path(self.state.best_model_checkpoint))
        else:
            super()._load_best_model()

    def _load_all(self, checkpoint: Path) -> None:
        with changing_weights(self.model, self.model):
            load_weights(self.model, checkpoint)
        for name, module in self._modules_in(checkpoint).items():
            load_weights(module, checkpoint / name)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._own_format() or not _holds_our_state(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        saved = load_file(Path(checkpoint, "optimizer.safetensors"))
        saved |= json.loads(Path(checkpoint, "optimizer.json").read_text())
        by_name: dict[str, dict[str, Any]] = {}
        for key, value in saved.items():
            name, _, entry = key.rpartition("|")
            by_name.setdefault(name, {})[entry] = value
        named = self._named_trained()
        names: dict[str, torch.nn.Parameter] = {}
        for optimizer in self._torch_optimizers():
            trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
            of_this = {name: parameter for name, parameter in named.items() if parameter in trained}
            for name in of_this.keys() & by_name.keys():
                by_name[name].pop(zero_state.MASTER, None)
                optimizer.state[of_this[name]] = {
                    entry: _beside(value, of_this[name]) if isinstance(value, torch.Tensor) and value.dim() else value
                    for entry, value in by_name[name].items()
                }
            names |= of_this
        if self.is_deepspeed_enabled:
            zero_state.put_state(self._torch_optimizer(), named, by_name)
            names |= {name: parameter for name, parameter in named.items() if parameter.requires_grad}
        for kind, left in (("fresh", names.keys() - by_name.keys()), ("dropped", by_name.keys() - names.keys())):
            if left:
                logger.warning(
                    f"Resuming with {kind} optimizer state for {len(left)} parameters: {sorted(left)[0]} ..."
                )
        self._load_scheduler(json.loads(Path(checkpoint, "scheduler.json").read_text()))

    def _load_scheduler(self, state: dict[str, Any]) -> None:
        scheduler = self.lr_scheduler
        # Schedules that follow a metric also store the rates that they have reached
        if not isinstance(scheduler, LambdaLR):
            scheduler.load_state_dict(state)
            for group, rate in zip(scheduler.optimizer.param_groups, state["_last_lr"], strict=True):
                group["lr"] = rate
            return
        scheduler.last_epoch, scheduler._step_count = state["last_epoch"], state["_step_count"]
        rates = [base * factor(scheduler.last_epoch) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates

    def _load_rng_state(self, checkpoint: str | None) -> None:
        rank = self.args.process_index
        file = Path(checkpoint or "", f"rng_state_{rank}.safetensors")
        if checkpoint is None or not file.exists():
            super()._load_rng_state(checkpoint)
            return
        plain = json.loads(file.with_suffix(".json").read_text())
        version, internal, gauss = plain["python"]
        random.setstate((version, tuple(internal), gauss))
        kind, keys, pos, has_gauss, cached = plain["numpy"]
        np.random.set_state((kind, np.array(keys, dtype=np.uint32), pos, has_gauss, cached))
        tensors = load_file(file)
        torch.set_rng_state(tensors.pop("cpu"))
        if torch.cuda.is_available() and tensors:
            torch.cuda.set_rng_state_all([tensors[f"cuda.{i}"] for i in range(len(tensors))])

    def _load_scaler(self, checkpoint: str | None) -> None:
        file = Path(checkpoint or "", "scaler.json")
        if checkpoint is None or not file.exists():
            super()._load_scaler(checkpoint)
        else:
            self.accelerator.scaler.load_state_dict(json.loads(file.read_text()))


def _holds_our_state(checkpoint: str | Path) -> bool:
    return Path(checkpoint, OPTIMIZER[0]).exists()


def _gathered(value: Any) -> Any:
    """The whole of a sharded tensor, in the memory of the host."""
    return full(value).cpu() if isinstance(value, DTensor) else value


def _beside(state: torch.Tensor, parameter: torch.nn.Parameter) -> torch.Tensor:
    """Move optimizer state to its parameter's device and shards. State that was bf16 is widened if its parameter is now
    float32.

    Checkpoints from before small modules had float32 weights hold such bf16 state.
    """
    floats = state.is_floating_point() and state.shape == parameter.shape
    dtype = torch.promote_types(state.dtype, parameter.dtype) if floats else state.dtype
    state = state.to(parameter.device, dtype)
    sharded = isinstance(parameter, DTensor) and state.shape == parameter.shape
    return distribute_tensor(state, parameter.device_mesh, parameter.placements) if sharded else state


def _state_of(optim: str) -> str:
    """The kind of an optimizer's state. Paged and fused variants have the same state as the plain optimizer."""
    return optim.removeprefix("paged_").removesuffix("_fused")


def _metric_of(schedule: str) -> str | None:
    """The name of a schedule that follows a metric; None if the schedule is a function of the step."""
    return schedule if schedule in ("reduce_lr_on_plateau", "greedy") else None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _check_numbers(file: Path) -> None:
    """Raise a CheckpointError that names the first NaN entry of a JSON file."""

    def look(value: Any, name: str) -> None:
        if isinstance(value, dict | list):
            for key, part in value.items() if isinstance(value, dict) else enumerate(value):
                look(part, f"{name}.{key}" if name else str(key))
        elif isinstance(value, float) and math.isnan(value):
            raise CheckpointError(f"{file}: {name} is NaN, so the run had diverged; resume from an earlier checkpoint")

    look(json.loads(file.read_text()), "")
