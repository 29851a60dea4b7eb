"""SPO on TRL's GRPOTrainer. The differences from GRPO:

- The sampler draws prompts by how uncertain their outcome is.
- `_advantages` replaces GRPO's advantages by reward minus tracked value, whitened over all processes.
- Checkpoints hold the tracker, the sampler and the last responses, in `spo_state.safetensors` with `spo_state.json`.

Every process keeps the same state: samples are gathered from all processes.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.utils.data import Sampler
from trl import GRPOTrainer

from ..common.fingerprint import content_hash
from ..common.grpo_checkpointing import GRPOCheckpointMixin
from ..common.model_loading import default_args
from ..common.saved_weights import CheckpointError
from ..common.single_sample import OwnAdvantages
from ..common.state_file import check_state, load_state, save_state, saved_shapes, tensors_file
from .config import SPOConfig
from .memory import Response, batch_of, pack, unpack
from .method import METHOD
from .sampler import PrioritizedSampler


ROW = "spo_row"  # the column with the row number of an example
OTHER_ROWS = "the values in spo_state.safetensors belong to the rows of another training dataset; resume with that one"


class SPOTrainer(OwnAdvantages, GRPOCheckpointMixin, GRPOTrainer):
    """Single-stream Policy Optimization (arXiv 2509.13232): a drop-in for TRL's `GRPOTrainer` without groups.

    A = r - v, whitened over the rollout, where v is the prompt's tracked expected reward (`AutoAdaptiveValueTracker`).
    Rewards must be from 0 to 1. The constructor is that of `GRPOTrainer`.

    Attributes:
        tracker: the `AutoAdaptiveValueTracker`.

    Raises:
        ValueError: in the constructor, for a training dataset that is not a `Dataset` or has fewer rows than a rollout.
    """

    _tag_names = ["trl", "spo"]
    _name = "SPO"
    _paper = {
        "title": "Single-stream Policy Optimization",
        "id": "2509.13232",
        "citation": (
            "@article{xu2025single,\n  title = {Single-stream Policy Optimization},\n  author = {Zhongwen Xu and Zihan "
            "Ding},\n  year = 2025,\n  eprint = {arXiv:2509.13232},\n}"
        ),
    }

    def __init__(self, *args: Any, **kwargs: Any):
        given = inspect.signature(GRPOTrainer.__init__).bind(self, *args, **kwargs).arguments
        given.pop("self")
        if given.get("args") is None:
            given["args"] = default_args(given["model"], SPOConfig, self._name)
        config, dataset = given["args"], given.get("train_dataset")
        if not isinstance(config, SPOConfig):
            raise ValueError(f"args is a {type(config).__name__}; SPO needs an SPOConfig")
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"train_dataset is a {type(dataset).__name__}, but SPO tracks every row; pass a datasets.Dataset"
            )
        given["train_dataset"] = dataset.add_column(ROW, list(range(len(dataset))))
        super().__init__(**given)
        self.tracker = config.tracker(len(dataset)).to(self.accelerator.device)
        self._memory: dict[int, Response] = {}
        self._sampler: PrioritizedSampler | None = None

    # -- prompts ----------------------------------------------------------------------------------------------------

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ROW not in self._signature_columns:
            self._signature_columns.append(ROW)

    def _get_train_sampler(self, dataset: Dataset | None = None) -> Sampler:
        if not self.shuffle_dataset:
            return super()._get_train_sampler(dataset)
        rows = len(self.train_dataset if dataset is None else dataset)
        self._sampler = PrioritizedSampler(
            lambda: self.tracker.value().expand(rows),
            rows,
            self.args.generation_batch_size,
            self.num_iterations * self.args.steps_per_generation,
            self.args.seed,
            self.args.sampling_epsilon,
        )
        return self._sampler

    # -- advantages -------------------------------------------------------------------------------------------------

    def _advantages(self, inputs: list[dict[str, Any]], output: dict[str, Any], rewards: torch.Tensor) -> torch.Tensor:
        device, count = self.accelerator.device, len(inputs)
        rows = self.accelerator.gather(torch.tensor([row[ROW] for row in inputs], device=device))
        whole = self.args.value_tracker == "global"
        tracked = torch.zeros_like(rows) if whole else rows
        # The global value was last updated at the last rollout, a prompt's value at its last visit
        keys = torch.arange(len(rows), device=device) if whole else rows
        divergence = None
        if self.args.rho_mode == "kl":
            divergence = self.accelerator.gather(self._divergence(self._local(keys, count).tolist()))
            self._remember(keys.tolist(), output)
        value = self.tracker.value(tracked)
        rho = self.tracker.update(tracked, rewards, divergence)
        known = ~rewards.isnan()
        for name, x in (("value", value[known]), ("rho", rho[known])):
            self._metrics["train"][f"spo/{name}"].append(x.mean().item())
        if divergence is not None:
            self._metrics["train"]["spo/divergence"].append(divergence.nanmean().item())
        return self._local(whitened(rewards - value), count).float()

    @torch.no_grad()
    def _divergence(self, keys: list[int]) -> torch.Tensor:
        """Mean |change of log-prob| of the last response to each of `keys`, (B,) in nats per token; NaN if there is
        none."""
        found = torch.full((len(keys),), torch.nan, device=self.accelerator.device)
        known = [i for i, key in enumerate(keys) if key in self._memory]
        most = int(self.accelerator.gather(torch.tensor([len(known)], device=found.device)).max())
        if most == 0:
            return found
        # Each process runs equally many forwards, because sharded models need it
        responses = [self._memory[keys[i]] for i in known] + [_ANY] * (most - len(known))
        batch = batch_of(responses, self._tokenizer.pad_token_id)
        ids, attention, before, mask = (x.to(found.device) for x in batch)
        change = (self._log_probs(ids, attention, mask.shape[1]) - before).abs()
        change[mask == 0] = torch.nan
        found[known] = change.nanmean(1)[: len(known)]  # NaN at tokens of tools
        return found

    @torch.no_grad()
    def _remember(self, keys: list[int], output: dict[str, Any]) -> None:
        mask = output["completion_mask"]
        prompt, completion = output["prompt_ids"], output["completion_ids"]
        log_probs = output.get("old_per_token_logps")
        if log_probs is None:
            attention = torch.cat([output["prompt_mask"], output["completion_mask"]], dim=1)
            log_probs = self._log_probs(torch.cat([prompt, completion], dim=1), attention, completion.shape[1])
        if "tool_mask" in output:
            log_probs = log_probs.masked_fill(output["tool_mask"] == 0, torch.nan)
        ours = (prompt, output["prompt_mask"], completion, log_probs.float(), mask)
        prompts, heres, completions, log_probs, masks = (
            self.accelerator.gather(self.accelerator.pad_across_processes(x, dim=1, pad_first=left)).cpu()
            for x, left in zip(ours, (True, True, False, False, False), strict=True)
        )
        for i, key in enumerate(keys):
            told = masks[i].bool()
            if told.any():
                self._memory[key] = Response(prompts[i][heres[i].bool()], completions[i][told], log_probs[i][told])

    def _log_probs(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, length: int) -> torch.Tensor:
        """Log-probabilities of the last `length` tokens under the current policy, (B, length)."""
        size = self.args.per_device_train_batch_size
        return self._get_per_token_logps_and_entropies(self.model, input_ids, attention_mask, length, size)[0]

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        return {"dataset": content_hash(self.train_dataset, ["prompt"]), "value_tracker": self.args.value_tracker}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if not self.args.should_save:
            return
        tensors = {f"tracker.{name}": x for name, x in self.tracker.state_dict().items()}
        tensors |= {f"memory.{name}": x for name, x in pack(self._memory).items()}
        if self._sampler is not None:
            over = float(self.state.epoch).is_integer()  # the next epoch makes new draws
            tensors |= {f"sampler.{name}": x for name, x in self._sampler.state_dict(over).items()}
        save_state(output_dir, METHOD.name, tensors, self._settings())

    def _check_checkpoint(self, checkpoint: Path) -> None:
        super()._check_checkpoint(checkpoint)
        why = {"dataset": OTHER_ROWS}
        check_state(
            checkpoint, METHOD.name, self._settings(), why, unknown={"memory.log_probs"}
        )  # NaN at tokens of tools
        drawn = "sampler.draws" in saved_shapes(checkpoint, METHOD.name)
        if drawn != self.shuffle_dataset:
            file = tensors_file(checkpoint, METHOD.name)
            raise CheckpointError(f"{file}: shuffle_dataset was {drawn}, is {self.shuffle_dataset}")

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, x in load_state(checkpoint, METHOD.name).items():
            part, _, name = name.partition(".")
            parts.setdefault(part, {})[name] = x
        self.tracker.load_state_dict(parts["tracker"])
        self._memory = unpack(parts["memory"])
        if self._sampler is not None:
            self._sampler.load_state_dict(parts["sampler"])


_ANY = Response(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(1))


def whitened(values: torch.Tensor) -> torch.Tensor:
    """(values - mean) / (standard deviation + 1e-8) of values (N,) that are not NaN; 0 elsewhere, and if all are equal."""
    known = values[~values.isnan()]
    spread = known.std() if len(known) > 1 else known.new_zeros(())
    if spread < 1e-8:
        return torch.zeros_like(values)
    return ((values - known.mean()) / (spread + 1e-8)).nan_to_num(nan=0.0)
