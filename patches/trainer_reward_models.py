"""Patch of the classes with which TRL's trainers load reward models and tokenizers: functions of ours load them.

TRL 1.15 calls `from_pretrained` of two names in the trainer's module. Inside `loading_reward_models` these names are
subclasses whose `from_pretrained` is ours, which refuses incomplete files.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

from .registry import Patch, PatchError, Site, applied


NAME = "trainer_reward_models"
MODEL, TOKENIZER = "AutoModelForSequenceClassification", "AutoTokenizer"
_loaders: ContextVar[Mapping[str, Callable] | None] = ContextVar("reward_model_loaders", default=None)


@contextlib.contextmanager
def loading_reward_models(init: Callable, model: Callable, tokenizer: Callable) -> Iterator[None]:
    """Load a trainer's reward models and their tokenizers with these functions, while the context is open.

    Args:
        init: the trainer's `__init__`. It gives the module in which the trainer finds the two classes. A module without
            them is left alone (TRL's `SFTTrainer` takes no reward models).
        model: called as `model(name, **kwargs)`.
        tokenizer: called as `tokenizer(name, **kwargs)`.
    """
    names = inspect.unwrap(init).__globals__
    token = _loaders.set({MODEL: model, TOKENIZER: tokenizer})
    try:
        with applied(NAME, names) if names.keys() & {MODEL, TOKENIZER} else contextlib.nullcontext():
            yield
    finally:
        _loaders.reset(token)


def _sites(*owners: Any) -> list[Site]:
    if not owners:
        raise PatchError(
            f"patch {NAME!r} is for the module of one trainer: use patches.trainer_reward_models.loading_reward_models"
        )
    return [(owner, name) for owner in owners for name in (MODEL, TOKENIZER) if name in owner]


def _wrap(original: Any) -> type:
    def from_pretrained(cls: type, name: str, *args: Any, **kwargs: Any) -> Any:
        loaders = _loaders.get()
        load = original.from_pretrained if loaders is None else loaders[original.__name__]
        return load(name, *args, **kwargs)

    return type(original.__name__, (original,), {"from_pretrained": classmethod(from_pretrained)})


PATCH = Patch(
    name=NAME,
    package="trl",
    target=f"{MODEL} and {TOKENIZER} in the module of a TRL trainer",
    parameters=("pretrained_model_name_or_path",),
    signed=lambda owner, attribute: inspect.unwrap(owner[attribute].from_pretrained),
    sites=_sites,
    wrap=_wrap,
    places=(
        "transformers/models/auto/auto_factory.py:_BaseAutoModelClass.from_pretrained",
        "transformers/models/auto/tokenization_auto.py:AutoTokenizer.from_pretrained",
    ),
    effect="Functions of ours load reward models and their tokenizers.",
    reason="every trainer, while it is constructed: a reward model with incomplete files is an error",
    upstream="https://github.com/huggingface/transformers/issues/32067",
    removable="when transformers can refuse to load incomplete files",
    scoped=True,
)
