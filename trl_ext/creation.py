"""How a model comes into an SFT trainer: TRL's own, or the one that Unsloth puts in its place when it is imported first."""

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import trl
from peft import PeftConfig, get_peft_model
from transformers import PreTrainedModel, set_seed


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


def on_unsloths_trainer() -> bool:
    """Whether `trl.SFTTrainer` is Unsloth's."""
    return trl.SFTTrainer.__name__ != "SFTTrainer"


def check_name(model: PreTrainedModel | str) -> None:
    """Raises a ValueError for a model's name, which Unsloth's trainer does not load."""
    if isinstance(model, str) and on_unsloths_trainer():
        raise ValueError(
            f"model={model!r}: Unsloth's trainer, which is live since Unsloth was imported, takes no names; load the model "
            "with AutoModelForCausalLM"
        )


def with_adapter(
    model: PreTrainedModel | str, peft_config: PeftConfig | None, seed: int
) -> tuple[PreTrainedModel | str, PeftConfig | None]:
    """The model and the `peft_config` for `SFTTrainer.__init__`. Unsloth's trainer ignores the latter: applied here."""
    if peft_config is None or not on_unsloths_trainer():
        return model, peft_config
    set_seed(seed)
    return get_peft_model(model, peft_config), None


def name_of(model: PreTrainedModel | str) -> str:
    """Where a model, or the path of one, comes from; empty if nobody knows."""
    return model if isinstance(model, str) else model.config._name_or_path


def default_args(model: PreTrainedModel | str, config_class: type, name: str) -> Any:
    """A trainer's configuration where none is given: as TRL's, it leaves files in a folder named after model and method."""
    return config_class(f"{name_of(model).split('/')[-1]}-{name.replace(' ', '-')}")
