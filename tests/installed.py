"""Which versions the tests run on."""

from packaging.version import Version

from patches.versions import installed_version


def at_least(package: str, version: str) -> bool:
    found = installed_version(package)
    return found is not None and found >= Version(version)


# PEFT 0.21 and TRL 1.16 call what transformers 5.23 renamed by its old names. The message of such a warning, as a pattern
OLD_NAMES = ".*gradient_checkpointing"
