"""What every method that attaches modules to a causal LM does alike: checks, settings, adapters."""

from dataclasses import asdict, fields
from typing import Any

from peft import PeftConfig, PeftModel
from torch import nn

from .method import Method
from .settings_file import check_free, describe_when_saved
from .wrapping import backbone_of


def settings_of(model: nn.Module, method: Method) -> Any:
    """The settings that a model's modules of a method were attached with; None if it has none.

    Args:
        model: a causal LM, wrapped by PEFT or not.
    """
    return getattr(backbone_of(model), method.attribute, None)


def attached_modules(model: nn.Module, method: Method) -> tuple[str, ...]:
    """Which of a method's modules the decoder of a model has."""
    backbone = backbone_of(model)
    return tuple(name for name in method.modules if hasattr(backbone, name))


def check_attachable(model: nn.Module, method: Method) -> nn.Module:
    """The decoder that the modules go to.

    Raises:
        ValueError: the model has them already, or has the settings of another method.
    """
    if settings_of(model, method) is not None:
        raise ValueError(f"{type(model).__name__} has the {method.what} already")
    check_free(model, method.name)
    return backbone_of(model)


def check_attached(model: nn.Module, method: Method, arguments: str = "model") -> None:
    """Raises a ValueError for a model without the modules of a method. It names the call that attaches them."""
    if settings_of(model, method) is None:
        raise ValueError(f"{type(model).__name__} has no {method.what}; call {method.attach}({arguments}) first")


def remember(model: nn.Module, method: Method, settings: Any, **more: Any) -> None:
    """Note in a model how its new modules were made. From now on its settings are saved with it, and a model card.

    Args:
        settings: a dataclass.
        **more: further values for the file, which are not settings.
    """
    backbone = backbone_of(model)
    setattr(backbone, method.attribute, settings)
    setattr(model.config, method.key, {**asdict(settings), **more})
    describe_when_saved(model, backbone)


def read_settings(
    saved: Any, name: str, method: Method, newer: tuple[str, ...] = (), beside: tuple[str, ...] = ()
) -> Any:
    """The settings dataclass of a method, out of what `remember` wrote into the JSON of a folder.

    Args:
        saved: what the JSON holds.
        name: of the folder or hub repository, for messages.
        newer: fields that older folders may lack; they get their defaults.
        beside: values that must stand there too and are no settings.

    Raises:
        ValueError: something is missing, unknown or of the wrong type.
    """
    cls = method.settings_class()
    known = {f.name for f in fields(cls)} | set(beside)
    if isinstance(saved, dict):
        saved = {f.name: f.default for f in fields(cls) if f.name in newer} | saved
    if not isinstance(saved, dict) or saved.keys() != known:
        wrong = ", ".join(sorted(known ^ saved.keys())) if isinstance(saved, dict) else repr(saved)
        raise ValueError(f"{name}: its {method.name} settings are not those of this version: {wrong}")
    try:
        return cls(**{key: value for key, value in saved.items() if key not in beside})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: its {method.name} settings: {error}") from error


def with_modules(config: PeftConfig, method: Method, modules: tuple[str, ...] | None = None) -> dict[str, Any]:
    """The fields of a PEFT config that make it train and save a method's modules in full, and LoRA leave them alone.

    Args:
        modules: those that the model has; None: all of the method's.

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
    """Raises a ValueError if the active adapter leaves a method's modules untrained and unsaved.

    Args:
        lacks: fields of the adapter's config that were found wanting already.
    """
    adapter = model.peft_config[model.active_adapter]
    if not set(attached_modules(model, method)) <= set(getattr(adapter, "modules_to_save", None) or ()):
        lacks = (*lacks, "modules_to_save")
    if lacks:
        complete = next(name for name in method.exports if name.startswith("with_"))
        raise ValueError(
            f"the adapter's {' and '.join(lacks)} would leave the {method.what} untrained and unsaved: pass the bare model "
            f"with peft_config, or a config that unsloth_ext.{complete} has completed"
        )
