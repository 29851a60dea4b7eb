"""Checks, settings and adapters of methods that attach modules to a causal LM."""

from dataclasses import asdict, fields
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from .method import Method
from .settings_file import check_free, describe_when_saved
from .wrapping import backbone_of


def settings_of(model: nn.Module, method: Method) -> Any:
    """Return the settings that a method's modules were attached with, or None if the model has no such modules.

    Args:
        model: a causal LM, wrapped by PEFT or not.
        method: the record of the method.

    Returns:
        The settings dataclass of the method, or None.
    """
    return getattr(backbone_of(model), method.attribute, None)


def attached_modules(model: nn.Module, method: Method) -> tuple[str, ...]:
    """Return the names of those modules of a method that the decoder of a model has."""
    backbone = backbone_of(model)
    return tuple(name for name in method.modules if hasattr(backbone, name))


def check_attachable(model: nn.Module, method: Method) -> nn.Module:
    """Check that a method's modules can be attached to a model.

    Args:
        model: a causal LM, wrapped by PEFT or not.
        method: the record of the method.

    Returns:
        The decoder that the modules go to.

    Raises:
        ValueError: the model already has these modules, or has the settings of another method.
    """
    if settings_of(model, method) is not None:
        raise ValueError(f"{type(model).__name__} already has the {method.what}")
    check_free(model, method.name)
    return backbone_of(model)


def check_attached(model: nn.Module, method: Method, arguments: str = "model") -> None:
    """Check that a model has the modules of a method.

    Args:
        model: a causal LM, wrapped by PEFT or not.
        method: the record of the method.
        arguments: the arguments of the attaching call, for the message.

    Raises:
        ValueError: the model has no such modules. The message names the call that attaches them.
    """
    if settings_of(model, method) is None:
        raise ValueError(f"{type(model).__name__} has no {method.what}; call {method.attach}({arguments}) first")


def remember(model: nn.Module, method: Method, settings: Any, **more: Any) -> None:
    """Store a method's settings in a model, so that they are saved with it, together with a model card.

    Args:
        model: a causal LM with the method's modules.
        method: the record of the method.
        settings: a dataclass.
        **more: other values for the file.
    """
    backbone = backbone_of(model)
    setattr(backbone, method.attribute, settings)
    setattr(model.config, method.key, {**asdict(settings), **more})
    describe_when_saved(model, backbone)


def read_settings(saved: Any, name: str, method: Method, beside: tuple[str, ...] = ()) -> Any:
    """Rebuild the settings of a method from the JSON that `remember` wrote.

    Args:
        saved: what the JSON holds.
        name: the folder or hub repository, for messages.
        method: the record of the method.
        beside: values that must also be there and are no settings.

    Returns:
        The settings dataclass of the method.

    Raises:
        ValueError: a value is missing, unknown or of the wrong type.
    """
    cls = method.settings_class()
    known = {f.name for f in fields(cls)} | set(beside)
    if isinstance(saved, dict):
        saved = {f.name: f.default for f in fields(cls) if f.name in method.newer} | saved
    if not isinstance(saved, dict) or saved.keys() != known:
        wrong = ", ".join(sorted(known ^ saved.keys())) if isinstance(saved, dict) else repr(saved)
        raise ValueError(f"{name}: its {method.name} settings are not those of this version: {wrong}")
    try:
        return cls(**{key: value for key, value in saved.items() if key not in beside})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: its {method.name} settings: {error}") from error


def with_modules(config: PeftConfig, method: Method, modules: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Return the fields of a PEFT config that train and save a method's modules in full and keep LoRA off them.

    Args:
        config: the PEFT config to complete.
        method: the record of the method.
        modules: the modules that the model has. None means all of the method's.

    Returns:
        Fields for `dataclasses.replace(config, **fields)`.

    Raises:
        ValueError: the PEFT method has no `modules_to_save`.
    """
    if not hasattr(config, "modules_to_save"):
        raise ValueError(f"{type(config).__name__} cannot train the {method.what}: it has no modules_to_save; use LoRA")
    modules = method.modules if modules is None else modules
    changes = {"modules_to_save": list(dict.fromkeys([*(config.modules_to_save or []), *modules]))}
    if method.linear_modules and getattr(config, "target_modules", None) == "all-linear":
        changes["exclude_modules"] = [*(config.exclude_modules or []), *method.linear_modules]
    return changes


def check_adapter(model: PeftModel, method: Method, lacks: tuple[str, ...] = ()) -> None:
    """Check that the active adapter trains and saves a method's modules.

    Args:
        model: the PEFT model.
        method: the record of the method.
        lacks: fields of the adapter's config that the caller already found incomplete.

    Raises:
        ValueError: a field is incomplete.
    """
    adapter = model.peft_config[model.active_adapter]
    if not set(attached_modules(model, method)) <= set(getattr(adapter, "modules_to_save", None) or ()):
        lacks = (*lacks, "modules_to_save")
    if lacks:
        complete = next(name for name in method.exports if name.startswith("with_"))
        raise ValueError(
            f"the adapter's {' and '.join(lacks)} would leave the {method.what} untrained and unsaved: pass the bare model "
            f"with peft_config, or a config completed by unsloth_ext.{complete}"
        )
