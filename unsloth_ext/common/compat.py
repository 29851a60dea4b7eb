"""Differences between the tested versions of other packages, in one place.

Each says what changed, since which version, and when it can go: as soon as the oldest version in `pyproject.toml` has the
change. Patches of code that is mended upstream are in `patches/`, with the same facts.
"""

from typing import Any

from packaging.version import Version
from torch import nn

from patches.versions import installed_version


def at_least(package: str, version: str) -> bool:
    """Return whether a package is installed in a version or a newer one. A pre-release counts as its release."""
    found = installed_version(package)
    return found is not None and Version(found.base_version) >= Version(version)


# transformers 5.24 calls the cache `cache` in every forward, output and `generate`, and takes the old name, with a warning,
# until 5.40. Can go with transformers 5.23: write `cache`.
CACHE = "cache" if at_least("transformers", "5.24") else "past_key_values"

# transformers 5.23 calls gradient checkpointing activation checkpointing, and takes the old names, with a warning,
# until v6. Can go with transformers 5.22: write `activation_checkpointing`.
CHECKPOINTING = "activation_checkpointing" if at_least("transformers", "5.23") else "gradient_checkpointing"


def is_checkpointing(model: nn.Module) -> bool:
    """Return whether a model recomputes activations in the backward."""
    return bool(getattr(model, f"is_{CHECKPOINTING}", False))


def enable_checkpointing(model: nn.Module, settings: dict[str, Any] | None = None) -> None:
    """Make a transformers model recompute activations in the backward.

    Args:
        model: the model, wrapped by PEFT or not.
        settings: keywords for `torch.utils.checkpoint.checkpoint`.
    """
    getattr(model, f"{CHECKPOINTING}_enable")(settings)
