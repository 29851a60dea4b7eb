"""The registry of patches: what they change in other packages, for which versions, and how they are undone.

There are two kinds of records. A `Patch` replaces a function or a class by one that calls the original; no upstream
code is copied. A `Switch` sets an upstream flag to another value. Both name the upstream code they were written for, and
`status` warns if the installed code differs from that of all tested versions.
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
    "fsdp2_one_unit",
    "fsdp_loading",
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
    "vllm_checkpoints",
    "vllm_engine_settings",
    "vllm_pushed_weights",
    "zero3_loading",
)

_lock = threading.RLock()
_MARK = "__latent_patch__"


class PatchError(RuntimeError):
    """A patch cannot be applied, or an applied patch is not live."""


class UnknownPatchError(PatchError, KeyError):
    """No patch has that name."""

    def __str__(self) -> str:
        return str(self.args[0])


class SignatureChangedError(PatchError):
    """The upstream function no longer has the parameters that the wrapper was written for."""


Site = tuple[Any, str]
"""An object and the name of its attribute, or a mapping (a module's globals, `os.environ`) and a key of it."""


class Change:
    """One site that is changed now. It holds only a weak reference to its object, so it keeps no model in memory."""

    def __init__(self, owner: Any, attribute: str, replacement: Any):
        try:
            self._owner: Callable[[], Any] = weakref.ref(owner)
        except TypeError:  # this kind of object supports no weak references
            self._owner = lambda: owner
        self.attribute = attribute
        self.own = attribute in _attributes(owner)
        self.original = _read(owner, attribute)
        self.replacement = replacement
        self.permanent = False  # whether `apply` made it, and not only `applied`
        self.scopes = 0  # the number of open `applied` blocks that need it

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
    """The common part of `Patch` and `Switch`.

    Attributes:
        name: the name that `patches.apply` takes.
        package: the distribution whose tested range is checked first.
        target: the dotted name of the changed object, for messages.
        sites: `sites(*owners) -> list[Site]`. Without owners it returns all default places. It may import the package.
        places: of the upstream code this was written for, `"package/file.py:name"`. `known_code.json` has the fingerprints.
        effect: what it changes, in one sentence.
        reason: when and why it is needed, for `make doctor`.
        upstream: the upstream issue or pull request, or that there is none.
        removable: when this record can be deleted.
        scoped: it is applied inside a block with `patches.applied`, and not permanently.
    """

    name: str
    package: str
    target: str
    sites: Callable[..., list[Site]]
    places: tuple[str, ...]
    effect: str
    reason: str
    upstream: str
    removable: str
    scoped: bool = False
    changes: list[Change] = field(default_factory=list, init=False)

    def is_ours(self, owner: Any, attribute: str) -> bool:
        """Return whether the site holds what this project puts there."""
        raise NotImplementedError

    def check(self, owner: Any, attribute: str) -> None:
        """Raise a PatchError if the site is not what the record was written for."""

    def replacement(self, owner: Any, attribute: str) -> Any:
        """Return the new value of the site."""
        raise NotImplementedError


@dataclass(kw_only=True)
class Patch(Record):
    """A reversible replacement of a function or a class.

    Attributes:
        parameters: the parameter names of the target when the wrapper was written, in order.
        wrap: `wrap(original) -> replacement`.
        signed: `signed(owner, attribute)` returns the function that has the parameters, if the target itself has not.
    """

    parameters: tuple[str, ...]
    wrap: Callable[[Any], Any]
    signed: Callable[[Any, str], Any] = lambda owner, attribute: _get(owner, attribute)

    def is_ours(self, owner: Any, attribute: str) -> bool:
        return hasattr(_read(owner, attribute), _MARK)  # copies and inherited replacements count as ours too

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
    """An upstream flag that is set to another value.

    Attributes:
        value: `value()` returns the value to set. It may read the target's package.
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
                f"switch {self.name!r} was set on {_describe(owner)}.{attribute}, but it has another value now; "
                "something set it later"
            )

    def replacement(self, owner: Any, attribute: str) -> Any:
        return self.value()


@dataclass(frozen=True)
class PatchStatus:
    """The state of one patch.

    Attributes:
        name: the name of the patch.
        target: the dotted name of the changed object.
        applied: the number of sites that are changed now.
        live: whether there are such sites, and each still holds our replacement.
        fingerprint: that of the installed upstream code (12 hex digits of a SHA-256); several are joined by spaces.
            Empty if the package is not installed.
        warnings: one sentence for each piece of upstream code that differs from the one this was written for.
    """

    name: str
    target: str
    applied: int
    live: bool
    fingerprint: str
    warnings: tuple[str, ...] = ()


@functools.cache
def get(name: str) -> Patch | Switch:
    """Return the record with this name. Its module is imported now, the code that it changes is not.

    Raises:
        UnknownPatchError: `name` is not in `NAMES`.
    """
    if name not in NAMES:
        raise UnknownPatchError(f"no patch is called {name!r}; there are: {', '.join(NAMES)}")
    return importlib.import_module(f"{__package__}.{name}").PATCH


def apply(name: str, *owners: Any) -> None:
    """Apply a patch permanently. A second call changes nothing.

    Args:
        name: the name of the patch.
        *owners: the objects to change. None given means every place where the target is bound now.

    Raises:
        UnknownPatchError: `name` is not in `NAMES`.
        UntestedVersionError: the package is outside its tested range and the override is not set.
        SignatureChangedError: the target's parameters differ from the recorded ones.
        PatchError: the target was not found, or a flag was set to a third value.
    """
    with _lock:
        for change in _changed(get(name), owners):
            change.permanent = True
        verify(name)


def revert(name: str) -> None:
    """Restore what was replaced, bit for bit. Nothing happens if the patch is not applied."""
    patch = get(name)
    with _lock:
        while patch.changes:
            patch.changes.pop().undo()


@contextlib.contextmanager
def applied(name: str, *owners: Any) -> Iterator[None]:
    """Apply a patch inside a `with` block.

    Blocks may be nested, and may overlap in several threads: the last one to close restores a site. A site that `apply`
    has changed stays changed.

    Args:
        name: the name of the patch.
        *owners: as for `apply`.

    Raises:
        PatchError: as for `apply`, with its other errors.
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
    """Return the changes at a patch's sites. Missing ones are made."""
    versions.require_tested(patch.package)
    sites = patch.sites(*owners)
    if not sites:
        raise PatchError(f"patch {patch.name!r}: {patch.target} was not found in {patch.package}")
    patch.changes[:] = [change for change in patch.changes if change.owner is not None]
    todo = [(owner, attribute) for owner, attribute in sites if not patch.is_ours(owner, attribute)]
    for owner, attribute in todo:
        patch.check(owner, attribute)
    replacements: dict[int, Any] = {}  # families that share a function share its replacement
    before = len(patch.changes)
    try:
        for owner, attribute in todo:
            original = _read(owner, attribute)
            if id(original) not in replacements:
                replacements[id(original)] = patch.replacement(owner, attribute)
            change = Change(owner, attribute, replacements[id(original)])
            change.make()
            patch.changes.append(change)
    except BaseException:  # all sites are changed, or none
        while len(patch.changes) > before:
            patch.changes.pop().undo()
        raise
    places = {(id(owner), attribute) for owner, attribute in sites}
    return [change for change in patch.changes if (id(change.owner), change.attribute) in places]


def verify(name: str) -> None:
    """Check that our function runs at every site that `apply` changed.

    Raises:
        PatchError: another one runs there.
    """
    patch = get(name)
    for change in list(patch.changes):
        owner, attribute = change.owner, change.attribute
        if owner is not None and not patch.is_ours(owner, attribute):
            raise PatchError(
                f"patch {name!r} was applied to {_describe(owner)}.{attribute}, but another function runs there now; "
                "something imported later replaced it: apply the patch again"
            )


def status() -> dict[str, PatchStatus]:
    """Return the state of every patch. Nothing is imported that is not loaded yet."""
    with _lock:
        return {name: _status(get(name)) for name in NAMES}


def _status(patch: Patch | Switch) -> PatchStatus:
    sites = [(change.owner, change.attribute) for change in patch.changes if change.owner is not None]
    live = bool(sites) and all(patch.is_ours(*site) for site in sites)
    installed = versions.installed_version(patch.package) is not None
    changes = [fingerprints.change(place) for place in patch.places] if installed else []
    warnings = tuple(f"{patch.name}: {change}" for change in changes if change)
    fingerprint = " ".join(dict.fromkeys(filter(None, map(fingerprints.installed, patch.places))))
    return PatchStatus(patch.name, patch.target, len(sites), live, fingerprint, warnings)


def _attributes(owner: Any) -> Mapping[str, Any]:
    return owner if isinstance(owner, MutableMapping) else vars(owner)


def _read(owner: Any, attribute: str) -> Any:
    """Return the value at a site without calling descriptors; None if there is none."""
    if isinstance(owner, MutableMapping):
        return owner.get(attribute)
    return inspect.getattr_static(owner, attribute, None)


def _get(owner: Any, attribute: str) -> Any:
    """Return the value at a site, as its users see it."""
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
