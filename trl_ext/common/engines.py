"""What cannot train on which engine of `accelerate launch`, and why: one table for all trainers.

What the table does not name works, or was not tried; docs/engines.md says what was run.
"""

import os
from collections.abc import Mapping
from typing import Any

from transformers.training_args import OptimizerNames
from transformers.utils.generic import strtobool

from patches.versions import installed_version
from unsloth_ext.common.compat import at_least


ENGINES = {
    "fsdp1": "FSDP1",
    "fsdp2": "FSDP2",
    "zero1": "DeepSpeed ZeRO-1",
    "zero2": "DeepSpeed ZeRO-2",
    "zero3": "DeepSpeed ZeRO-3",
}
SHARDED = tuple(ENGINES)
DEEPSPEED = tuple(engine for engine in ENGINES if engine.startswith("zero"))

_FLAT = "it has flat pieces of weights between the layers' forwards, and the method needs whole ones; use FSDP2"
_OUTSIDE = "it reads weights outside of the forwards that gather them; use FSDP2"
_SCALED = "it scales float16 gradients for its own optimizer alone; use bf16=True"

_ROWS = "it needs the rows and columns of whole weights, and these are split or flattened; set another optim"
_UNEVEN = "a process whose texts have ended gathers no thinking modules, and the others would wait; leave it out"

_FILE = "trainers make their own, with a learning rate for each role; take it out of the file and set optim"

_MOMENTS = "it keeps the moments of weights in pieces of its own; leave it out, or use FSDP2"

_COPIED = "the decoder is a copy of the model, whose weights are already split when it is loaded; use FSDP2 or ZeRO-2"

REFUSED: Mapping[str, Mapping[str, str]] = {
    "Adafactor": dict.fromkeys(SHARDED, _ROWS),
    "An optimizer in DeepSpeed's file": dict.fromkeys(DEEPSPEED, _FILE),
    "A recipe": {"fsdp1": "its evaluation writes texts, for which the weights must be whole; use FSDP2"},
    "HRPO": {"fsdp1": _FLAT},
    "HRPO with ds3_gather_for_generation=False": {"zero3": _UNEVEN},
    "Latent distillation": {"fsdp1": _FLAT},
    "Latent distillation with an adapter": {"zero3": _OUTSIDE},
    "Latent distillation with reset_optimizer=True": dict.fromkeys(DEEPSPEED, _MOMENTS),
    "Latent distillation with w_step_decoder": {"zero3": _COPIED},
    "Latent distillation with w_step_decoder and fp16=True": dict.fromkeys(SHARDED, _SCALED),
    "KV distillation with fp16=True": dict.fromkeys(SHARDED, _SCALED),
    "Concept tokens with an adapter": {"fsdp1": _FLAT},
    "Concept tokens with codebook_init='kmeans'": {"fsdp1": _FLAT},
    "Concept tokens with calibrate_null=True": {"fsdp1": _FLAT},
    "Planner-executor": {"fsdp1": _FLAT, "zero3": _OUTSIDE},
    "PPO with fp16=True": dict.fromkeys(SHARDED, _SCALED),
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


def check_engine(args: Any, method: str, options: Mapping[str, Any] | None = None) -> None:
    """Raise a ValueError, before anything is loaded, if a method cannot train on the engine of the launch.

    Args:
        args: the trainer's arguments.
        method: the method.
        options: by the text after "with" in `REFUSED`, whether the option is set.
    """
    engine = engine_of(args) or ""
    chosen = {f"{method} with {option}": value for option, value in (options or {}).items()}
    rows = [REFUSED.get(method, {}), *(REFUSED[name] for name in chosen)]
    for name, row, asked in zip((method, *chosen), rows, (True, *chosen.values()), strict=True):
        reason = row.get(engine) if asked else None
        if reason is not None:
            raise ValueError(f"{name} cannot train on {ENGINES[engine]}: {reason}")


def check_torch(args: Any) -> None:
    """Raise a ValueError, before anything is loaded, for FSDP2 with a torch on which it fails.

    With torch 2.11 and 2.12 the concept trainer's second forward of a step sees split weights.

    Args:
        args: the trainer's arguments; None: the defaults.
    """
    if engine_of(args) == "fsdp2" and not at_least("torch", "2.13"):
        raise ValueError(
            f"FSDP2 needs torch 2.13 or newer here, and torch {installed_version('torch')} is installed; "
            "other engines work with it"
        )


def check_optimizer(args: Any) -> None:
    """Raise a ValueError, before anything is loaded, if the optimizer cannot train on the engine of the launch.

    Args:
        args: the trainer's arguments; None: the defaults.
    """
    if getattr(args, "optim", None) == OptimizerNames.ADAFACTOR:
        check_engine(args, "Adafactor")
    plugin = getattr(args, "deepspeed_plugin", None)
    if plugin is not None and "optimizer" in plugin.deepspeed_config:
        check_engine(args, "An optimizer in DeepSpeed's file")


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
