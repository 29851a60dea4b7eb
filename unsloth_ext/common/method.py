"""The record that declares a method on the model side, and how records are found.

The folder of a method holds a file `method.py` with one `METHOD = Method(...)`. All code that needs a list of methods
reads these records: exports, loaders, saved folders, model cards, adapters and generation. A record imports nothing. It
names functions and classes by the module of the folder that they are in.
"""

import functools
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


PACKAGE = __package__.partition(".")[0]
# A method that adds modules to a model needs all of these fields
WITH_MODULES = ("what", "key", "settings", "attribute", "modules", "attach", "loader", "dropped", "example")


@dataclass(frozen=True, kw_only=True)
class Method:
    """A method on the model side. All fields but `name` and `exports` are for methods that add modules to a causal LM.

    Attributes:
        name: the name of the folder. It is also written to `latent_reasoning.json`.
        exports: the public names of the method, each with the module of the folder that defines it.
        what: the modules as messages call them, such as "thinking modules".
        key: the key of the settings in the model's configuration, such as "thinking".
        settings: the public name or "module:name" of the dataclass of settings. Its values are saved as JSON, so a list is
            read back as a list and a tuple is not read back as a tuple.
        attribute: the attribute of the decoder that holds these settings, such as "thinking_config".
        modules: names of the submodules that the decoder gets. No model may have tensors with such a name already.
        linear_modules: those of them with linear layers, which LoRA on "all-linear" must skip.
        attach: the public function that adds the modules to a model.
        loader: the public class that opens saved folders.
        about: what such a model does, one sentence for its model card. Of a method without modules and without a training
            side, its title, a colon, and a sentence for the documentation's index.
        dropped: what a loader that does not know the method leaves out, for the model card.
        drop: "module:name" of the function that removes the modules from a model, so that a plain one remains. Empty if
            what remains would be another model.
        example: Python lines that open a saved folder and use it. `{where}` stands for the folder.
        completion: "module:name" of the function that completes prompts, see `unsloth_ext.common.completions.complete`.
            Empty means that `model.generate` does all by itself.
        likelihood: "module:name" of the function that computes log-likelihoods of continuations, see
            `unsloth_ext.common.completions.log_likelihood`, or "forward" if the model's own forward has them. Empty means
            that they have no meaning.
        states: what that function accepts as `state`: "on", and ablations of the model's latent steps. "off" decodes
            without them.
        newer: settings that folders of earlier versions lack; they get their defaults.
        refused_arguments: arguments of `generate` that do not work with this method. Those that work with no method are
            in `unsloth_ext.common.generation_arguments`.
        without_vllm: why `generate` cannot decode with `engine="vllm"`, for the message that refuses it.

    Raises:
        ValueError: a field is missing or of the wrong kind.
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
    drop: str = ""
    example: str = ""
    completion: str = ""
    likelihood: str = ""
    states: tuple[str, ...] = ("on",)
    newer: tuple[str, ...] = ()
    refused_arguments: tuple[str, ...] = ()
    without_vllm: str = "this method decodes with transformers only"

    def __post_init__(self) -> None:
        file = file_of(self)
        missing = [name for name in WITH_MODULES if not getattr(self, name)]
        if missing and len(missing) < len(WITH_MODULES):
            raise ValueError(
                f"{file}: a method that adds modules to a model also needs the fields {', '.join(missing)}"
            )
        check_tuples(self, "modules", "linear_modules", "states", "newer", "refused_arguments")
        public = {"attach": self.attach, "loader": self.loader}
        if ":" not in self.settings:
            public["settings"] = self.settings
        for name, value in public.items():
            if value and value not in self.exports:
                raise ValueError(f"{file}: {name}={value!r} is not among the exports")

    def settings_class(self) -> type:
        """Return the dataclass of settings."""
        return self._find(self.settings)

    def attach_function(self) -> Callable[..., Any]:
        """Return the function that gives a model the modules."""
        return self._find(self.attach)

    def loader_class(self) -> Any:
        """Return the class that opens saved folders."""
        return self._find(self.loader)

    def completion_function(self) -> Callable[..., Any]:
        """Return the function that completes prompts. The record must name one."""
        return self._find(self.completion)

    def drop_function(self) -> Callable[..., Any]:
        """Return the function that removes the modules. The record must name one."""
        return self._find(self.drop)

    def likelihood_function(self) -> Callable[..., Any]:
        """Return the function that computes log-likelihoods. The record must name one."""
        return self._find(self.likelihood)

    def _find(self, named: str) -> Any:
        """Return what is called by a public name or by "module:name"."""
        module, _, name = named.rpartition(":")
        return getattr(importlib.import_module(f"{PACKAGE}.{self.name}.{module or self.exports[name]}"), name)


@functools.cache
def all_methods() -> dict[str, Method]:
    """Return every record of this package by the name of its method, one for each folder with a `method.py`.

    Raises:
        ValueError: two methods have the same key, attribute or module, so a saved folder could be of either.
    """
    found = records(PACKAGE)
    owners: dict[tuple[str, str], str] = {}
    for method in (method for method in found.values() if method.key):
        names = [("key", method.key), ("attribute", method.attribute), *(("module", name) for name in method.modules)]
        for kind, name in names:
            other = owners.setdefault((kind, name), method.name)
            if other != method.name:
                raise ValueError(f"{file_of(method)}: the {kind} {name!r} is that of {other} already")
    return found


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
        module = f"{package}.{folder.name}.method"
        if folder.name == "common" or not folder.ispkg or importlib.util.find_spec(module) is None:
            continue
        record = importlib.import_module(module).METHOD
        if record.name != folder.name:
            raise ValueError(
                f"{module.replace('.', '/')}.py: the record is called {record.name!r}, its folder {folder.name!r}"
            )
        found[record.name] = record
    return found


def public_names(common: Mapping[str, str], methods: Mapping[str, Any]) -> dict[str, str]:
    """Return the public names of a package, each with the module below the package that defines it.

    Args:
        common: the names that belong to no method.
        methods: the records of the package.

    Raises:
        ValueError: a record exports a name that another module exports already.
    """
    found = dict(common)
    for method in methods.values():
        for name, module in method.exports.items():
            if name in found:
                raise ValueError(f"{file_of(method)}: the export {name} is that of {found[name]} already; rename one")
            found[name] = f"{method.name}.{module}"
    return found


def check_tuples(record: Any, *names: str) -> None:
    """Raise a ValueError for a field that is no tuple, such as `("name")`, which lacks a comma."""
    for name in names:
        if not isinstance(getattr(record, name), tuple):
            raise ValueError(
                f"{file_of(record)}: {name}={getattr(record, name)!r} is not a tuple; a tuple of one has a comma at its end"
            )


def file_of(record: Any) -> str:
    """Return the file of a record, for messages."""
    return f"{type(record).__module__.partition('.')[0]}/{record.name}/method.py"
