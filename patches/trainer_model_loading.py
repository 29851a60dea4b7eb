"""Patch of `create_model_from_path`, with which TRL's trainers load models by name: missing tensors are reported.

TRL 1.15 draws tensors that are missing from a model's files at random, with a warning that is easily overlooked. Inside
`watching_models`, a function of ours gets each model and the names of its missing tensors before the trainer continues.
It may raise an error, or attach modules.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from .registry import Patch, PatchError, Site, applied


NAME = "trainer_model_loading"
FUNCTION = "create_model_from_path"
Seen = Callable[[Any, str, Any], None]
Around = Callable[[], contextlib.AbstractContextManager]
_watchers: ContextVar[tuple[tuple[dict, Seen, Around], ...]] = ContextVar("model_watchers", default=())


@contextlib.contextmanager
def watching_models(init: Callable, seen: Seen, around: Around = contextlib.nullcontext) -> Iterator[None]:
    """Call `seen(model, name, missing_keys)` for each model that a trainer loads by name, while the context is open.

    Contexts of one kind of trainer may be nested: the outermost `seen` is called first. Contexts of different trainers,
    and of other threads, do not see each other's models.

    Args:
        init: the trainer's `__init__`. It gives the module in which the trainer finds `create_model_from_path`. A
            module without it is left alone (Unsloth's trainers take no names of models).
        seen: the function to call.
        around: makes a context manager, in which the next of these models is loaded.
    """
    names = inspect.unwrap(init).__globals__
    token = _watchers.set((*_watchers.get(), (names, seen, around)))
    try:
        with applied(NAME, names) if FUNCTION in names else contextlib.nullcontext():
            yield
    finally:
        _watchers.reset(token)


def _sites(*owners: Any) -> list[Site]:
    if not owners:
        raise PatchError(
            f"patch {NAME!r} is for the module of one trainer: use patches.trainer_model_loading.watching_models"
        )
    return [(owner, FUNCTION) for owner in owners]


def _wrap(original: Any) -> Any:
    @functools.wraps(original)
    def create_model_from_path(model_id: str, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        every = _watchers.get()  # empty in another thread
        watchers = [one for one in every if one[0] is every[-1][0]]  # of the innermost trainer under construction
        with contextlib.ExitStack() as stack:
            for _, _, around in watchers:
                stack.enter_context(around())
            model, found = original(model_id, *args, output_loading_info=True, **kwargs)
        for _, seen, _ in watchers:
            seen(model, model_id, found["missing_keys"])
        return (model, found) if output_loading_info else model

    return create_model_from_path


PATCH = Patch(
    name=NAME,
    package="trl",
    target="create_model_from_path in the module of a TRL trainer",
    parameters=("model_id", "architecture"),
    sites=_sites,
    wrap=_wrap,
    places=("trl/trainer/utils.py:create_model_from_path",),
    effect="A function of ours sees each model that a trainer loads by name, and the tensors that its files lacked.",
    reason="every trainer, while it is constructed: incomplete files are errors, and models get their modules",
    upstream="https://github.com/huggingface/transformers/issues/32067",
    removable="when TRL's trainers can be given a function that loads the model",
    scoped=True,
)
