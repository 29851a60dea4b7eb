"""The record that declares a method on the model side, and how records are found.

The folder of a method holds a file `method.py` with one `METHOD = Method(...)`. All code that needs a list of methods
reads these records: exports, loaders, saved folders, model cards, adapters and generation. A record imports nothing. It
names functions and classes by the module of the folder that they are in.
"""

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


PACKAGE = __package__.partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method on the model side. All fields but `name` and `exports` are for methods that add modules to a causal LM.

    Attributes:
        name: the name of the folder. It is also written to `latent_reasoning.json`.
        exports: the public names of the method, each with the module of the folder that defines it.
        what: the modules as messages call them, such as "thinking modules".
        key: the key of the settings in the model's configuration, such as "thinking".
        settings: the public name or "module:name" of the dataclass of settings.
        attribute: the attribute of the decoder that holds these settings, such as "thinking_config".
        modules: names of the submodules that the decoder gets.
        linear_modules: those of them with linear layers, which LoRA on "all-linear" must skip.
        attach: the public function that adds the modules to a model.
        loader: the public class that opens saved folders.
        about: what such a model does, one sentence for its model card. Of a method without modules and without a training
            side, its title, a colon, and a sentence for the documentation's index.
        dropped: what a loader that does not know the method leaves out, for the model card.
        example: Python lines that open a saved folder and use it. `{where}` stands for the folder.
        refused_arguments: arguments of `generate` that do not work with this method. Those that work with no method are
            in `unsloth_ext.common.generation_arguments`.
    """

    name: str
    exports: Mapping[str, str] = field(default_factory=dict)
    what: str = ""
    key: str = ""
    settings: str = ""
    attribute: str = ""
    modules: tuple[str, ...] = ()
    linear_modules: tuple[str, ...] = ()
    attach: str = ""
    loader: str = ""
    about: str = ""
    dropped: str = ""
    example: str = ""
    refused_arguments: tuple[str, ...] = ()

    def settings_class(self) -> type:
        """The dataclass of settings."""
        module, _, name = self.settings.rpartition(":")
        return getattr(importlib.import_module(f"{PACKAGE}.{self.name}.{module or self.exports[name]}"), name)


@functools.cache
def all_methods() -> dict[str, Method]:
    """Return every record of this package by the name of its method, one for each folder with a `method.py`."""
    return records(PACKAGE)


def attaching_methods() -> dict[str, Method]:
    """Return the methods that add modules to a model, by name."""
    return {name: method for name, method in all_methods().items() if method.key}


def records(package: str) -> dict[str, Any]:
    """Return `METHOD` of every folder of a package with a `method.py`, by the name of the folder, in alphabetical
    order.

    Raises:
        ValueError: a record has another name than its folder.
    """
    found = {}
    for folder in pkgutil.iter_modules(importlib.import_module(package).__path__):
        place = getattr(folder.module_finder, "path", "")
        if folder.name == "common" or not Path(place, folder.name, "method.py").is_file():
            continue
        module = f"{package}.{folder.name}.method"
        record = importlib.import_module(module).METHOD
        if record.name != folder.name:
            raise ValueError(f"{module}: the record is called {record.name!r}, its folder {folder.name!r}")
        found[record.name] = record
    return found
