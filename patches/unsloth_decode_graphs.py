"""Switch that turns off Unsloth's decoding from CUDA graphs, which would skip our embedding hook."""

from typing import Any

from .registry import Site, Switch


def _sites(*owners: Any) -> list[Site]:
    from unsloth.models import _decode_graphs

    return [(owner, "ENABLED") for owner in owners or (_decode_graphs,)]


PATCH = Switch(
    name="unsloth_decode_graphs",
    package="unsloth",
    target="unsloth.models._decode_graphs.ENABLED",
    sites=_sites,
    value=lambda: False,
    places=("unsloth/models/_decode_graphs.py:enabled",),
    effect="Unsloth decodes without CUDA graphs.",
    reason="hybrid decoding on Unsloth, while it runs: replayed graphs skip Python hooks",
    upstream="no upstream issue is known; the flag is Unsloth's own override",
    removable="when Unsloth leaves graphs off for modules with forward hooks",
    scoped=True,
)
