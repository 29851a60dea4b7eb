"""The versions that were tested together, and the check that stands before every patch and in `make doctor`."""

import os
from importlib import metadata

from packaging.specifiers import SpecifierSet
from packaging.version import Version


ALLOW_UNTESTED = "LATENT_ALLOW_UNTESTED_VERSIONS"
"""Set this environment variable to 1 to go on with versions nobody has tested together."""

TESTED = {
    "torch": SpecifierSet(">=2.11,<2.14"),
    "transformers": SpecifierSet("==5.17.*"),
    "trl": SpecifierSet("==1.15.*"),
    "peft": SpecifierSet("==0.21.*"),
    "accelerate": SpecifierSet("==1.15.*"),
    "datasets": SpecifierSet(">=4.8,<5"),
    "bitsandbytes": SpecifierSet("==0.50.*"),
    "unsloth": SpecifierSet("==2026.10.9"),
    "unsloth_zoo": SpecifierSet("==2026.10.9"),
}
OPTIONAL = frozenset({"bitsandbytes", "unsloth", "unsloth_zoo"})


class UntestedVersionError(ImportError):
    """An installed version lies outside the tested range."""


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
