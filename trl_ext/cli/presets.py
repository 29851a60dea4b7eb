"""Configurations by name: fields that belong together. What is given beside the name wins, a default among it."""

from typing import Any, ClassVar


class Presets:
    """For a config: what it offers by name.

    Attributes:
        presets: the fields that each name sets.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Any:
        """A configuration by name, with `changes`.

        Raises:
            ValueError: there is none of that name.
        """
        return cls(**{**cls.preset_fields(name), **changes})

    @classmethod
    def preset_fields(cls, name: str) -> dict[str, Any]:
        """The fields that a preset sets."""
        if name not in cls.presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}; it has {', '.join(cls.presets)}")
        return cls.presets[name]
