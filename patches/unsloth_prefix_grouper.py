"""Switch that turns off Unsloth's shared-prompt deduplication (PrefixGrouper), which does not forward whole rows."""

from typing import Any

from .registry import Site, Switch


def _sites(*owners: Any) -> list[Site]:
    from unsloth.utils import prefix_grouper

    return [(owner, "_ENABLED") for owner in owners or (prefix_grouper,)]


PATCH = Switch(
    name="unsloth_prefix_grouper",
    package="unsloth",
    target="unsloth.utils.prefix_grouper._ENABLED",
    sites=_sites,
    value=lambda: False,
    places=("unsloth/utils/prefix_grouper.py:prefix_grouper_enabled",),
    effect="Unsloth's GRPO forwards each row of the batch with its prompt.",
    reason="HRPO on Unsloth, while the loss is computed: rows of the batch are found by their tokens",
    upstream="no upstream issue is known; the flag is Unsloth's own",
    removable="when thinking states can be laid out over shared prompts",
    scoped=True,
)
