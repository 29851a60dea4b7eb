"""Registry of patches: what is changed in other people's code, in which versions, and how it is undone.

There are two kinds of records. A `Patch` replaces a function or a class by one that calls the original: no upstream body
is copied. A `Switch` sets a flag of upstream's to another value. Both name the upstream code they were written for by
its fingerprint, and `status` warns when the installed code differs from it.
"""

import contextlib
import functools
import importlib
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from . import fingerprints, versions


NAMES = (
    "base_model_forward",
    "completions_table",
    "fused_lm_head",
    "granite_router_logits",
    "grpo_accumulated_loss",
    "grpo_log_probs",
    "llama_fast_forward",
    "peft_module_check",
    "save_pretrained",
    "trainer_model_loading",
    "trainer_reward_models",
    "unsloth_block_compile",
    "unsloth_decode_graphs",
    "unsloth_export",
    "unsloth_hidden_states",
    "unsloth_hidden_states_wrapper",
    "unsloth_prefix_grouper",
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
"""An object and the name of its attribute, or a mapping (a module's globals, `os.environ`) and a key of it."""


class Change:
    """One site that is changed now. It keeps no model alive: a site on an object that is gone is gone as well."""

    def __init__(self, owner: Any, attribute: str, replacement: Any):
        try:
            self._owner: Callable[[], Any] = weakref.ref(owner)
        except TypeError:  # a kind of object that takes no weak references
            self._owner = lambda: owner
        self.attribute = attribute
        self.own = attribute in _attributes(owner)
        self.original = _read(owner, attribute)
        self.replacement = replacement
        self.permanent = False  # made by `apply`, not only by `applied`
        self.scopes = 0  # how many `applied` blocks stand on it

    @property
    def owner(self) -> Any:
        return self._owner()

    def make(self) -> None:
        _write(self.owner, self.attribute, self.replacement)

    def undo(self) -> None:
        owner = self.owner
        if owner is None:
            return
        if self.own:
            _write(owner, self.attribute, self.original)
        elif isinstance(owner, MutableMapping):
            owner.pop(self.attribute, None)
        elif self.attribute in vars(owner):
            delattr(owner, self.attribute)


@dataclass(kw_only=True)
class Record:
    """What a `Patch` and a `Switch` have in common.

    Attributes:
        name: the name `patches.apply` takes.
        package: the distribution whose tested range is checked first.
        target: dotted name of what is changed, for messages.
        sites: `sites(*owners) -> list[Site]`; without owners, all default places. May import the target's package.
        fingerprints: of the upstream code this was written for: `{"package/file.py:name": hash}`, hashes by
            `patches.fingerprints.installed`.
        effect: what it changes, in one sentence.
        reason: when and why it is needed, for `make doctor`.
        upstream: the upstream issue or pull request, or that there is none.
        removable: when this record can be deleted.
        scoped: used with `patches.applied` for the length of a block, and not applied for good.
    """

    name: str
    package: str
    target: str
    sites: Callable[..., list[Site]]
    fingerprints: Mapping[str, str]
    effect: str
    reason: str
    upstream: str
    removable: str
    scoped: bool = False
    changes: list[Change] = field(default_factory=list, init=False)

    def is_ours(self, owner: Any, attribute: str) -> bool:
        """Whether the site holds what this project puts there."""
        raise NotImplementedError

    def check(self, owner: Any, attribute: str) -> None:
        """Raises a PatchError where the site is not what the record was written for."""

    def replacement(self, owner: Any, attribute: str) -> Any:
        """What to put at the site."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Patch(Record):
    """A reversible replacement of a function or a class.

    Attributes:
        parameters: parameter names of the target when the wrapper was written, in order.
        wrap: `wrap(original) -> replacement`.
        signed: `signed(owner, attribute)` gives the function that carries the parameters, when the target does not.
    """

    parameters: tuple[str, ...]
    wrap: Callable[[Any], Any]
    signed: Callable[[Any, str], Any] = lambda owner, attribute: _get(owner, attribute)

    def is_ours(self, owner: Any, attribute: str) -> bool:
        return hasattr(_read(owner, attribute), _MARK)  # a copy of ours, or one that is inherited, is ours too

    def check(self, owner: Any, attribute: str) -> None:
        found = tuple(inspect.signature(self.signed(owner, attribute)).parameters)
        if found[: len(self.parameters)] != self.parameters:
            raise SignatureChangedError(
                f"patch {self.name!r} was written for {self.target}({', '.join(self.parameters)}), but "
                f"{_describe(owner)}.{attribute} now takes ({', '.join(found)})"
            )

    def replacement(self, owner: Any, attribute: str) -> Any:
        replacement = self.wrap(_get(owner, attribute))
        setattr(replacement, _MARK, self.name)
        return replacement


@dataclass(kw_only=True)
class Switch(Record):
    """A flag of upstream's that is set to another value.

    Attributes:
        value: `value() -> what to set`. May read the target's package.
    """

    value: Callable[[], Any]

    def is_ours(self, owner: Any, attribute: str) -> bool:
        return any(
            change.owner is owner and change.attribute == attribute and _read(owner, attribute) == change.replacement
            for change in self.changes
        )

    def check(self, owner: Any, attribute: str) -> None:
        if any(change.owner is owner and change.attribute == attribute for change in self.changes):
            raise PatchError(
                f"switch {self.name!r} was set on {_describe(owner)}.{attribute}, but another value stands there now; "
                "something set it later"
            )

    def replacement(self, owner: Any, attribute: str) -> Any:
        return self.value()


@dataclass(frozen=True)
class PatchStatus:
    """State of one patch.

    Attributes:
        applied: how many sites are changed now.
        live: whether there are such sites, and each still holds what we put there.
        fingerprint: of the installed upstream code (12 hex digits of a SHA-256); several are joined by spaces. Empty
            where the package is not installed.
        warnings: one sentence for each piece of upstream code that is not the one this was written for.
    """

    name: str
    target: str
    applied: int
    live: bool
    fingerprint: str
    warnings: tuple[str, ...] = ()


@functools.cache
def get(name: str) -> Patch | Switch:
    """The record called `name`; its module is imported now, the code it changes is not."""
    if name not in NAMES:
        raise UnknownPatchError(f"no patch is called {name!r}; there are: {', '.join(NAMES)}")
    return importlib.import_module(f"{__package__}.{name}").PATCH


def apply(name: str, *owners: Any) -> None:
    """Change the target of `name` wherever it is bound now (or only on `owners`); a second call changes nothing.

    Raises:
        UnknownPatchError: `name` is not in `NAMES`.
        UntestedVersionError: the package is outside its tested range and the override is not set.
        SignatureChangedError: the target's parameters differ from the recorded ones.
        PatchError: the target is nowhere to be found, or a flag has been set to a third value since.
    """
    with _lock:
        for change in _changed(get(name), owners):
            change.permanent = True
        verify(name)


def revert(name: str) -> None:
    """Put back what was replaced, bit for bit; a patch that is not applied is left alone."""
    patch = get(name)
    with _lock:
        while patch.changes:
            patch.changes.pop().undo()


@contextlib.contextmanager
def applied(name: str, *owners: Any) -> Iterator[None]:
    """Apply for the length of a `with` block.

    Blocks may be nested, and may overlap in several threads: the last one that stands on a site puts it back. A site that
    `apply` has changed stays as it is.
    """
    patch = get(name)
    with _lock:
        held = _changed(patch, owners)
        for change in held:
            change.scopes += 1
    try:
        verify(name)
        yield
    finally:
        with _lock:
            for change in reversed(held):
                change.scopes -= 1
                if not change.scopes and not change.permanent and change in patch.changes:
                    patch.changes.remove(change)
                    change.undo()


def _changed(patch: Patch | Switch, owners: tuple[Any, ...]) -> list[Change]:
    """The changes at a patch's sites: those that are there, and the missing ones, made now."""
    versions.require_tested(patch.package)
    sites = patch.sites(*owners)
    if not sites:
        raise PatchError(f"patch {patch.name!r}: {patch.target} was not found in {patch.package}")
    patch.changes[:] = [change for change in patch.changes if change.owner is not None]
    todo = [(owner, attribute) for owner, attribute in sites if not patch.is_ours(owner, attribute)]
    for owner, attribute in todo:
        patch.check(owner, attribute)
    replacements: dict[int, Any] = {}  # families share one function: give them one replacement
    for owner, attribute in todo:
        original = _read(owner, attribute)
        if id(original) not in replacements:
            replacements[id(original)] = patch.replacement(owner, attribute)
        change = Change(owner, attribute, replacements[id(original)])
        patch.changes.append(change)
        change.make()
    places = {(id(owner), attribute) for owner, attribute in sites}
    return [change for change in patch.changes if (id(change.owner), change.attribute) in places]


def verify(name: str) -> None:
    """Raise `PatchError` unless our function is the one that runs at every site `apply` changed."""
    patch = get(name)
    for change in list(patch.changes):
        owner, attribute = change.owner, change.attribute
        if owner is not None and not patch.is_ours(owner, attribute):
            raise PatchError(
                f"patch {name!r} was applied to {_describe(owner)}.{attribute}, but another function runs there now; "
                "something imported later replaced it: apply the patch again"
            )


def status() -> dict[str, PatchStatus]:
    """State of every patch. Imports nothing that is not loaded yet."""
    with _lock:
        return {name: _status(get(name)) for name in NAMES}


def _status(patch: Patch | Switch) -> PatchStatus:
    sites = [(change.owner, change.attribute) for change in patch.changes if change.owner is not None]
    live = bool(sites) and all(patch.is_ours(*site) for site in sites)
    found = {place: fingerprints.installed(place) for place in patch.fingerprints}
    warnings = tuple(
        f"{patch.name} was written for {place} with fingerprint {patch.fingerprints[place]}, but "
        + (f"the installed code has {now}" if now else "it is not there any more")
        for place, now in found.items()
        if now != patch.fingerprints[place] and versions.installed_version(patch.package) is not None
    )
    fingerprint = " ".join(dict.fromkeys(now for now in found.values() if now))
    return PatchStatus(patch.name, patch.target, len(sites), live, fingerprint, warnings)


def _attributes(owner: Any) -> Mapping[str, Any]:
    return owner if isinstance(owner, MutableMapping) else vars(owner)


def _read(owner: Any, attribute: str) -> Any:
    """What stands at a site, without calling descriptors; None where there is nothing."""
    if isinstance(owner, MutableMapping):
        return owner.get(attribute)
    return inspect.getattr_static(owner, attribute, None)


def _get(owner: Any, attribute: str) -> Any:
    """What stands at a site, as its users see it."""
    return owner[attribute] if isinstance(owner, MutableMapping) else getattr(owner, attribute)


def _write(owner: Any, attribute: str, value: Any) -> None:
    if isinstance(owner, MutableMapping):
        owner[attribute] = value
    else:
        setattr(owner, attribute, value)


def _describe(owner: Any) -> str:
    if isinstance(owner, MutableMapping):
        return owner.get("__name__") or "os.environ"
    return getattr(owner, "__qualname__", None) or getattr(owner, "__name__", None) or type(owner).__name__
