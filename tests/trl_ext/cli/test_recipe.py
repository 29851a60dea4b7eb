"""The start and the end of a recipe's process."""

import sys
from types import SimpleNamespace

import pytest

from trl_ext.cli.recipe import leave, start
from trl_ext.common import engines


@pytest.mark.parametrize("engine", [None, False, True], ids=["no vLLM", "no engine here", "an engine"])
def test_the_process_group_is_left_to_an_engine_that_needs_it(monkeypatch, engine):
    ended = []
    monkeypatch.setattr("accelerate.PartialState.destroy_process_group", lambda _: ended.append(True))
    vllm = None if engine is None else SimpleNamespace(model_parallel_is_initialized=lambda: engine)
    monkeypatch.setitem(sys.modules, "vllm.distributed.parallel_state", vllm)
    leave()
    assert bool(ended) != bool(engine)


@pytest.mark.parametrize("engine", engines.ENGINES)
def test_engines_that_cannot_write_texts_are_refused_first(monkeypatch, engine):
    monkeypatch.setattr(engines, "engine_of", lambda args: engine)
    refused = engine in engines.REFUSED["A recipe"]
    with pytest.raises(ValueError if refused else AttributeError) as error:  # there are no arguments
        start(SimpleNamespace(), SimpleNamespace())
    assert not refused or str(error.value).startswith("A recipe cannot train on FSDP1: ")
