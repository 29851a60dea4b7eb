"""Named configurations: presets of fields that belong together. Explicit values override a preset, even if they are
defaults."""

from typing import Any, ClassVar


class Presets:
    """Mixin for a configuration with presets.

    Attributes:
        presets: for each name, the fields that it sets.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {}

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Any:
        """A configuration from a preset, with changes.

        Args:
            name: name of the preset.
            **changes: further fields, which override the preset.

        Returns:
            The configuration.

        Raises:
            ValueError: there is no such preset.
        """
        return cls(**{**cls.preset_fields(name), **changes})

    @classmethod
    def preset_fields(cls, name: str) -> dict[str, Any]:
        """The fields that a preset sets.

        Raises:
            ValueError: there is no such preset.
        """
        if name not in cls.presets:
            raise ValueError(f"{cls.__name__} has no preset {name!r}; it has {', '.join(cls.presets)}")
        return cls.presets[name]
