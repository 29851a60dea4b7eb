"""Unsloth as it is imported on a machine without a GPU: the same run as hrpo_losses.py, which calls no Unsloth."""

import unsloth


# isort: split
import json

import trl

from tests.unsloth_scripts import hrpo_losses


if __name__ == "__main__":
    report = {"cpu_backend": unsloth._IS_CPU_BACKEND, "parent": trl.GRPOTrainer.__module__}
    print(json.dumps(report | hrpo_losses.report()))
