"""How the weights of a trainer come to vLLM: whenever they changed, and without rounding those of the base model (ours)."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from patches.vllm_pushed_weights import pushed_weights
from unsloth_ext.common.checksum import checksum
from unsloth_ext.common.sharding import whole_weights


@contextlib.contextmanager
def pushing_weights(trainer: Any) -> Iterator[None]:
    """Let TRL push the weights for the rollouts in the block, if they changed since the last push.

    TRL pushes when the number of the step has changed. But weights can change without a step, as when a checkpoint is
    loaded, and `train` can begin again at the number where it was.

    Args:
        trainer: one of TRL's `GRPOTrainer`s, with `use_vllm`.
    """
    found = checksum(trainer.model)
    changed = torch.tensor([found != getattr(trainer, "pushed_weights", None)], dtype=torch.int64)
    if dist.is_initialized():  # all processes push together, also if only the part of one changed
        changed = changed.to(trainer.accelerator.device)
        dist.all_reduce(changed, dist.ReduceOp.MAX)
    if changed.item():
        trainer._last_loaded_step = -1
    trainer.pushed_weights = found
    with pushed_weights(whole_weights):
        yield
