import functools
import gc
import logging
import os
from pathlib import Path

import pytest
import torch
from xdist.scheduler import LoadFileScheduling


os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may reach a hub
if os.environ.get("TRITON_INTERPRET") == "1":
    from tests import vllm_on_cpu  # noqa: F401 - before TRL's trainers import vLLM
torch.set_num_threads(1)  # tiny tensors: threads only cost, and sums keep one order


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_log_handler_stays():
    """One that stays would show later tests every message twice."""
    yield
    assert not any(logging.getLogger(name).handlers for name in ("trl_ext", "unsloth_ext", "patches"))


@pytest.fixture(autouse=True, scope="module")
def _what_is_imported_is_no_garbage():
    """Trainers collect garbage, and each time would walk through all that was ever imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def transformers_warnings(caplog, monkeypatch):
    """`caplog` sees what goes through transformers' logger."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING)


class TogetherOnUnsloth(LoadFileScheduling):
    """A process takes whole files, and all that run scripts on Unsloth go to one, since its import takes half a minute."""

    def _split_scope(self, nodeid: str) -> str:
        file = super()._split_scope(nodeid)
        return "on Unsloth" if _runs_on_unsloth(file) else file


@functools.cache
def _runs_on_unsloth(file: str) -> bool:
    return "tests.unsloth_scripts" in Path(__file__).parents[1].joinpath(file).read_text()


@pytest.hookimpl(optionalhook=True)  # pytest -p no:xdist knows no such hook
def pytest_xdist_make_scheduler(config, log):
    return TogetherOnUnsloth(config, log)
