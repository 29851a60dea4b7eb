"""Registry of patches: what is replaced, in which versions, by what; apply, revert, verify, status.

A patch names one upstream function (`target`), the parameters it had when we wrote the wrapper (`parameters`), the
package whose tested range guards it, a `sites` function that returns every (owner, attribute) pair now bound to that
function, and a `wrap` function from the original to its replacement. Replacements call the original: no upstream body
is copied.
"""

import contextlib
import functools
import hashlib
import importlib
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from . import versions


NAMES = (
    "base_model_forward",
    "completions_table",
    "fused_lm_head",
    "granite_router_logits",
    "grpo_accumulated_loss",
    "llama_fast_forward",
    "peft_module_check",
    "save_pretrained",
    "unsloth_export",
    "unsloth_save_merged",
    "upload_saved",
)

_lock = threading.RLock()
_MARK = "__latent_patch__"


class PatchError(RuntimeError):
    """A patch cannot be applied, or what should be live is not."""


class UnknownPatchError(PatchError, KeyError):
    """No patch has that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class SignatureChangedError(PatchError):
    """The upstream function no longer has the parameters the wrapper was written for."""


Site = tuple[Any, str]
"""An object and the name of its attribute that is bound to the upstream function."""


@dataclass
class Patch:
    """One reversible replacement.

    Attributes:
        name: the name `patches.apply` takes.
        package: the distribution whose tested range is checked first.
        target: dotted name of what is replaced, for messages.
        parameters: parameter names of the target when the wrapper was written, in order.
        sites: `sites(*owners) -> list[Site]`; without owners, all default places. May import the target's package.
        wrap: `wrap(original) -> replacement`.
        reason: when and why it is needed, for `make doctor`.
        signed: `signed(owner, attribute)` gives the function that carries the parameters, when the target does not.
    """

    name: str
    package: str
    target: str
    parameters: tuple[str, ...]
    sites: Callable[..., list[Site]]
    wrap: Callable[[Any], Any]
    reason: str
    signed: Callable[[Any, str], Any] = getattr
    originals: list[tuple[Any, str, Any, bool]] = field(default_factory=list)


@dataclass(frozen=True)
class PatchStatus:
    """State of one patch: `applied` sites remembered, `live` when each of them still runs our function, and the
    `fingerprint` (first 12 hex digits of the SHA-256 of the replaced source; empty before `apply`)."""

    name: str
    target: str
    applied: int
    live: bool
    fingerprint: str


@functools.cache
def get(name: str) -> Patch:
    """The patch called `name`; its module is imported now, the code it changes is not."""
    if name not in NAMES:
        raise UnknownPatchError(f"no patch is called {name!r}; there are: {', '.join(NAMES)}")
    return importlib.import_module(f"{__package__}.{name}").PATCH


def _parameters(function: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _fingerprint(function: Any) -> str:
    try:
        source = inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):  # built at run time: no source to hash
        source = repr(inspect.signature(function))
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def apply(name: str, *owners: Any) -> None:
    """Replace the target of `name` wherever it is bound now (or only on `owners`); a second call changes nothing.

    Raises:
        UnknownPatchError: `name` is not in `NAMES`.
        UntestedVersionError: the package is outside its tested range and the override is not set.
        SignatureChangedError: the target's parameters differ from the recorded ones.
        PatchError: the target is nowhere to be found.
    """
    patch = get(name)
    with _lock:
        versions.require_tested(patch.package)
        sites = patch.sites(*owners)
        if not sites:
            raise PatchError(f"patch {name!r}: {patch.target} was not found in {patch.package}")
        todo = [(owner, attribute) for owner, attribute in sites if not _is_ours(owner, attribute)]
        for owner, attribute in todo:
            found = _parameters(patch.signed(owner, attribute))
            if found[: len(patch.parameters)] != patch.parameters:
                raise SignatureChangedError(
                    f"patch {name!r} was written for {patch.target}({', '.join(patch.parameters)}), but "
                    f"{_describe(owner)}.{attribute} now takes ({', '.join(found)})"
                )
        replacements: dict[int, Any] = {}  # families share one function: give them one replacement
        for owner, attribute in todo:
            original = inspect.getattr_static(owner, attribute)
            own = attribute in vars(owner)
            if id(original) not in replacements:
                replacement = patch.wrap(getattr(owner, attribute))
                setattr(replacement, _MARK, name)
                replacements[id(original)] = replacement
            setattr(owner, attribute, replacements[id(original)])
            patch.originals.append((owner, attribute, original, own))
        verify(name)


def revert(name: str) -> None:
    """Put back what `apply` replaced, bit for bit; a patch that is not applied is left alone."""
    patch = get(name)
    with _lock:
        while patch.originals:
            owner, attribute, original, own = patch.originals.pop()
            if own:
                setattr(owner, attribute, original)
            else:
                delattr(owner, attribute)


@contextlib.contextmanager
def applied(name: str, *owners: Any) -> Iterator[None]:
    """Apply for the length of a `with` block; a patch that was applied before stays applied after it."""
    before = len(get(name).originals)
    apply(name, *owners)
    try:
        yield
    finally:
        if not before:
            revert(name)


def verify(name: str) -> None:
    """Raise `PatchError` unless our function is the one that runs at every site `apply` changed."""
    for owner, attribute, _, _ in get(name).originals:
        if not _is_ours(owner, attribute):
            raise PatchError(
                f"patch {name!r} was applied to {_describe(owner)}.{attribute}, but another function runs there now; "
                "something imported later replaced it: apply the patch again"
            )


def status() -> dict[str, PatchStatus]:
    """State of every patch. Imports nothing that is not loaded yet."""
    with _lock:
        out = {}
        for name in NAMES:
            patch = get(name)
            live = bool(patch.originals) and all(_is_ours(owner, attr) for owner, attr, _, _ in patch.originals)
            fingerprint = _fingerprint(patch.originals[0][2]) if patch.originals else ""
            out[name] = PatchStatus(name, patch.target, len(patch.originals), live, fingerprint)
        return out


def _is_ours(owner: Any, attribute: str) -> bool:
    return hasattr(inspect.getattr_static(owner, attribute, None), _MARK)


def _describe(owner: Any) -> str:
    return getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__name__
