"""Switch that stops Unsloth's compilation of decoder layers in training, for layers in which we observe attention.

Once Unsloth has added LoRA to one model, it compiles the layers of all models of that class, stock ones too. An observer
inside a layer would be compiled into its graph. Checkpointing recomputes the layer when the observer is gone, which would
compile another graph and fail.
"""

from typing import Any

from .registry import PatchError, Site, Switch


NAME = "unsloth_block_compile"
ATTRIBUTE = "_unsloth_block_mode"


def _sites(*owners: Any) -> list[Site]:
    from unsloth.models import _block_compile

    if not owners:
        raise PatchError(f"patch {NAME!r} is applied to layers: patches.apply({NAME!r}, *layers)")
    return [(owner, ATTRIBUTE) for owner in owners if getattr(type(owner).forward, _block_compile._MARK, False)]


def _off() -> int:
    from unsloth.models import _block_compile

    return _block_compile._OFF


PATCH = Switch(
    name=NAME,
    package="unsloth",
    target=f"the attribute {ATTRIBUTE} of decoder layers",
    sites=_sites,
    value=_off,
    places=("unsloth/models/_block_compile.py:_wrap",),
    effect="Layers of this model run without Unsloth's compiled region.",
    reason="methods that look inside attention, on layers that Unsloth compiles: from the first look on",
    upstream="no upstream issue is known",
    removable="when Unsloth leaves layers alone whose attention function is a registered one",
)
