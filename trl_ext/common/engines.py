"""What cannot train on which engine of `accelerate launch`, and why: one table for all trainers.

What the table does not name works, or was not tried; docs/engines.md says what was run.
"""

import os
from collections.abc import Mapping
from typing import Any

from transformers.utils.generic import strtobool


ENGINES = {
    "fsdp1": "FSDP1",
    "fsdp2": "FSDP2",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
}
SHARDED = tuple(ENGINES)

_FLAT = "it has flat pieces of weights between the layers' forwards, and the method needs whole ones; use FSDP2"
_SPLIT = "its weights are split before the method's modules are attached; use FSDP2"
_FORWARD = "it needs the model's own forward, which the method does not call; use DDP (accelerate's multi_gpu)"
_OPTIMIZER = "policy and critic share one optimizer, which it would split; use DDP (accelerate's multi_gpu)"
_PROJECTION = "it splits the optimizer, so the projection cannot be trained; set freeze_aligner=True, or use DDP"

REFUSED: Mapping[str, Mapping[str, str]] = {
    "HRPO": {"fsdp1": _FLAT, "zero3": _SPLIT},
    "HRPO with use_vllm=True": {
        "fsdp2": "rollouts in vLLM need the weights of the thinking modules whole; set use_vllm=False, or use DDP",
    },
    "HRPO with recompute='soft_bptt'": {
        "fsdp2": "gradients pass from one forward to another outside of the model, where its weights are split; set "
        "another recompute, or use DDP",
    },
    "Latent distillation": {"fsdp1": _FLAT, "zero3": _SPLIT},
    "Latent distillation with an adapter": {
        "fsdp2": "transformers cannot tie the embeddings that PEFT has wrapped for the latent tokens; leave peft_config "
        "out, or use DDP",
    },
    "Logits distillation": {"zero3": "the teacher's weights would be split; use FSDP2"},
    "KV distillation": {"zero3": "the teacher's weights would be split; use FSDP2"},
    "KV distillation with freeze_aligner=False": dict.fromkeys(SHARDED, _PROJECTION),
    "Concept tokens": {"zero3": _SPLIT},
    "Planner-executor": dict.fromkeys(SHARDED, _FORWARD),
    "PPO": dict.fromkeys(SHARDED, _OPTIMIZER),
}
"""By method, or by method and option: the engines that it cannot train on, with the reason and what to do."""


def engine_of(args: Any) -> str | None:
    """Return the engine that a trainer would use: a key of `ENGINES`, or None for one process or DDP.

    Args:
        args: the trainer's arguments; None: the defaults.
    """
    if getattr(args, "deepspeed_plugin", None) is not None:
        return f"zero{args.deepspeed_plugin.zero_stage}"
    if getattr(args, "fsdp_plugin_args", None):
        return f"fsdp{args.fsdp_plugin_args['fsdp_version']}"
    if strtobool(os.environ.get("ACCELERATE_USE_FSDP", "false")):
        return f"fsdp{os.environ.get('FSDP_VERSION', '1')}"
    return None


def check_engine(args: Any, *methods: str) -> None:
    """Raise a ValueError, before anything is loaded, if a method cannot train on the engine of the launch.

    Args:
        args: the trainer's arguments.
        *methods: keys of `REFUSED`: the method, and its options that are set.
    """
    engine = engine_of(args)
    for method in methods:
        reason = REFUSED[method].get(engine or "")
        if reason is not None:
            raise ValueError(f"{method} cannot train on {ENGINES[engine or '']}: {reason}")


def table() -> str:
    """Return `REFUSED` as a Markdown table, for docs/engines.md."""
    lines = ["| what | cannot train on | because |", "|---|---|---|"]
    for method, cells in REFUSED.items():
        reasons: dict[str, list[str]] = {}
        for engine, reason in cells.items():
            reasons.setdefault(reason, []).append(ENGINES[engine])
        lines += [f"| {method} | {', '.join(names)} | {reason} |" for reason, names in reasons.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
