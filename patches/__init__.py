"""Reversible run-time changes to other packages. No other code of this project changes them.

>>> import patches
>>> patches.apply("fused_lm_head")      # idempotent; imports the target itself, so the order of imports does not matter
>>> patches.status()["fused_lm_head"].live
True
>>> patches.revert("fused_lm_head")

`apply`, `revert`, `applied` (a context manager) and `status` take the names in `patches.NAMES`. Unknown names, untested
versions and changed upstream signatures are errors. `import patches` imports and changes nothing.
"""

from .registry import (
    NAMES,
    PatchError,
    PatchStatus,
    SignatureChangedError,
    UnknownPatchError,
    applied,
    apply,
    get,
    revert,
    status,
    verify,
)


__all__ = [
    "NAMES",
    "PatchError",
    "PatchStatus",
    "SignatureChangedError",
    "UnknownPatchError",
    "applied",
    "apply",
    "get",
    "revert",
    "status",
    "verify",
]
