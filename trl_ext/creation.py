"""A word with each model that a TRL trainer creates from a path, before PEFT wraps it."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

from transformers import PreTrainedModel


@contextlib.contextmanager
def preparing_models(init: Callable, prepare: Callable[[PreTrainedModel], Any]) -> Iterator[None]:
    """While open, the trainer whose `__init__` this is calls `prepare(model)` on every model that it loads."""
    names = inspect.unwrap(init).__globals__
    create = names["create_model_from_path"]

    @functools.wraps(create)
    def create_and_prepare(*args: Any, **kwargs: Any) -> PreTrainedModel:
        model = create(*args, **kwargs)
        prepare(model)
        return model

    names["create_model_from_path"] = create_and_prepare
    try:
        yield
    finally:
        names["create_model_from_path"] = create
