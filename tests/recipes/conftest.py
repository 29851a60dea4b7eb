import pytest


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Where the recipes of a file's tests keep the models that they teach."""
    return tmp_path_factory.mktemp("cache")
