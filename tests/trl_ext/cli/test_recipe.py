"""The end of a recipe's process."""

import sys
from types import SimpleNamespace

import pytest

from trl_ext.cli.recipe import leave


@pytest.mark.parametrize("engine", [None, False, True], ids=["no vLLM", "no engine here", "an engine"])
def test_the_process_group_is_left_to_an_engine_that_needs_it(monkeypatch, engine):
    ended = []
    monkeypatch.setattr("accelerate.PartialState.destroy_process_group", lambda _: ended.append(True))
    vllm = None if engine is None else SimpleNamespace(model_parallel_is_initialized=lambda: engine)
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", vllm)
    leave()
    assert bool(ended) != bool(engine)
