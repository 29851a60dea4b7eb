"""The versions that were tested together, and the check that stands before every patch and in `make doctor`."""

import os
from importlib import metadata

from packaging.requirements import Requirement
from packaging.version import Version


ALLOW_UNTESTED = "LATENT_ALLOW_UNTESTED_VERSIONS"
"""Set this environment variable to 1 to go on with versions nobody has tested together."""


class UntestedVersionError(ImportError):
    """An installed version lies outside the tested range."""


def _read_requirements() -> list[Requirement]:
    """What pyproject.toml asks for, read from the installed package: always, and for Unsloth."""
    try:
        lines = metadata.requires("latent-reasoning-trl") or []
    except metadata.PackageNotFoundError:
        raise UntestedVersionError(
            "latent-reasoning-trl is not installed, so its tested versions are unknown. Run: pip install -e ."
        ) from None
    found = [Requirement(line) for line in lines]
    return [one for one in found if one.specifier and (not one.marker or one.marker.evaluate({"extra": "unsloth"}))]


TESTED = {one.name: one.specifier for one in _read_requirements()}
OPTIONAL = frozenset(one.name for one in _read_requirements() if one.marker)


def installed_version(package: str) -> Version | None:
    """Version of `package` from its metadata, without importing it; None when it is not installed."""
    try:
        return Version(metadata.version(package))
    except metadata.PackageNotFoundError:
        return None


def untested_allowed() -> bool:
    return os.environ.get(ALLOW_UNTESTED, "0") == "1"


def version_problem(package: str) -> str | None:
    """One sentence that names the bad pair and the command that mends it, or None when all is well."""
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
        raise UntestedVersionError(f"{problem}, or set {ALLOW_UNTESTED}=1 to go on untested.")
