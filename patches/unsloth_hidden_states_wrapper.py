"""Switch that turns off the wrapper of Unsloth's GRPO trainer around forwards that return no hidden states.

The wrapper would run a decoding step twice. The flag is an attribute of the model, which the wrapper reads.
"""

from typing import Any

from .registry import PatchError, Site, Switch


NAME = "unsloth_hidden_states_wrapper"
ATTRIBUTE = "_unsloth_grpo_hidden_states_unsafe"


def _sites(*owners: Any) -> list[Site]:
    if not owners:
        raise PatchError(f"patch {NAME!r} is applied to one model: patches.applied({NAME!r}, model)")
    return [(owner, ATTRIBUTE) for owner in owners]


PATCH = Switch(
    name=NAME,
    package="unsloth",
    target=f"the attribute {ATTRIBUTE} of a model",
    sites=_sites,
    value=lambda: True,
    places=("unsloth/models/rl.py:_install_grpo_hidden_states_forward_wrapper",),
    effect="Unsloth's wrapper calls the model's own forward.",
    reason="hybrid decoding on Unsloth, while it runs: the wrapper would run each step twice",
    upstream="no upstream issue is known; the flag is Unsloth's own",
    removable="when `unsloth_hidden_states` can be removed",
    scoped=True,
)
