"""Constructs every trainer in a process of its own, and prints what has changed in other packages: one line of JSON.

The modules and classes of trl, transformers, peft and accelerate that are loaded when ours begin are compared with
themselves afterwards, once the registered patches have been reverted.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401
import peft  # noqa: F401
import transformers
import trl
from trl.trainer import grpo_trainer, sft_trainer  # noqa: F401

import patches


PACKAGES = ("trl", "transformers", "peft", "accelerate")
THEIRS = ("__slotnames__", "_checkpoint_conversion_mapping_cache")  # caches of copyreg and transformers


def snapshot() -> dict[str, dict[str, Any]]:
    """What every module and class of these packages holds, by name."""
    found: dict[str, dict[str, Any]] = {"os.environ": dict(os.environ)}
    for name, module in list(sys.modules.items()):
        if module is not None and name.split(".")[0] in PACKAGES:
            found[name] = dict(vars(module))
            for key, value in found[name].items():
                if isinstance(value, type) and value.__module__ == name:
                    found[f"{name}.{key}"] = dict(vars(value))
    return found


def changes(before: dict, after: dict) -> list[str]:
    """Names that hold another object, or are gone, or are new in a class."""
    return [
        f"{place}.{name}"
        for place, values in before.items()
        for name in values.keys() | (after[place].keys() if isinstance(values.get("__module__"), str) else set())
        if name not in THEIRS
        and after[place].get(name) is not values.get(name)
        and after[place].get(name) != values.get(name)
    ]


def trainers(folder: Path) -> dict[str, Callable[[], Any]]:
    """One trainer of each method, from the name of a model's folder where it takes one."""
    from tests.trl_ext.concept import setups as concept
    from tests.trl_ext.distill import setups as distill
    from tests.trl_ext.hrpo import setups as hrpo
    from tests.trl_ext.kv_distill import setups as kv_distill
    from tests.trl_ext.latent import setups as latent
    from tests.trl_ext.planner import setups as planner
    from tests.trl_ext.ppo import setups as ppo
    from tests.trl_ext.spo import setups as spo

    return {
        "hrpo": lambda: hrpo.hrpo(folder / "hrpo"),
        "latent": lambda: latent.trainer(folder / "latent"),
        "kv_distill": lambda: kv_distill.trainer(folder / "kv_distill"),
        "concept": lambda: concept.trainer(folder / "concept"),
        "planner": lambda: planner.trainer(folder / "planner"),
        "spo": lambda: spo.spo(folder / "spo"),
        "ppo": lambda: ppo.ppo(folder / "ppo"),
        "logits": lambda: distill.logits(folder / "logits"),
        "reasoning": lambda: distill.reasoning(folder / "reasoning"),
    }


def main() -> dict[str, list[str]]:
    transformers.set_seed(0)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        made = trainers(Path(folder))
        if "plant" in sys.argv:
            made = {"planted": lambda: setattr(trl.GRPOTrainer, "log", print)}
        before = snapshot()
        for name, construct in made.items():
            trainer = construct()
            if name == "hrpo":  # whose rollouts change more for a while
                trainer.train()
            records = [patches.get(patch) for patch in patches.NAMES]
            left = [f"patch {record.name}" for record in records if record.scoped and record.changes]
            for patch in patches.NAMES:
                patches.revert(patch)
            after = snapshot()
            found[name] = left + sorted(changes(before, after))
            before = after
    return found


if __name__ == "__main__":
    print(json.dumps(main()))
