"""Marks of single cases."""

from typing import Any

import pytest


def slow(*case: Any) -> Any:
    """One that only `make test-slow` runs, beside others of its kind that always do."""
    return pytest.param(*case, marks=pytest.mark.slow)
