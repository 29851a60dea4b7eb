"""Model side: modules of each method, loading and saving, and decoding. Names are imported on first use."""

import importlib

from .common.method import all_methods, public_names


_WHERE = public_names(
    {
        "DelimiterMatcher": "common.delimiter",
        "attention_tap": "common.attention_tap",
        "backbone_of": "common.wrapping",
    },
    all_methods(),
)
__all__ = sorted(_WHERE)


def __getattr__(name: str):
    if name not in _WHERE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_WHERE[name]}", __name__), name)
    globals()[name] = value  # also over a submodule of the same name
    return value


def __dir__() -> list[str]:
    return __all__
