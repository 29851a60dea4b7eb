"""Settings of a plan's concepts and of how a model writes them."""

from dataclasses import dataclass, field, fields
from typing import Any


ORDERINGS = ("sequential", "parallel")


@dataclass
class ConceptTypeConfig:
    """One type of concept, with its own vocabulary and end token.

    Attributes:
        name: the name in logs.
        num_concepts: the number of codewords V, without `<EOS>`.
        quota: the largest number of concepts of this type in a plan.

    Raises:
        ValueError: a value has the wrong type or is out of range.
    """

    name: str = field(default="plan")
    num_concepts: int = field(default=256)
    quota: int = field(default=16)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name={self.name!r}: must be a name")
        for name in ("num_concepts", "quota"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: must be a whole number, at least 1")


@dataclass
class PlannerConfig:
    """How a model plans. Saved in `latent_reasoning.json`, and in a full model's `config.json`.

    Attributes:
        types: the types of concepts, in the order in which plans hold them. Dictionaries of the fields of
            `ConceptTypeConfig` are accepted.
        ordering: `"sequential"`: a type sees those before it. `"parallel"`: each sees only the text, and step j writes
            concept j of all types.
        multi_token: write all concepts of a type in one pass, from learned queries. They do not see each other.

    Raises:
        ValueError: a value is unknown, or two types have the same name.
    """

    types: list[ConceptTypeConfig] = field(default_factory=lambda: [ConceptTypeConfig()])
    ordering: str = field(default="sequential")
    multi_token: bool = field(default=False)

    def __post_init__(self) -> None:
        if not isinstance(self.types, list | tuple) or not self.types:
            raise ValueError(f"types={self.types!r}: must be a list of at least one ConceptTypeConfig")
        self.types = [_concept_type(given) for given in self.types]
        names = [kind.name for kind in self.types]
        if len(set(names)) < len(names):
            raise ValueError(f"types: their names must differ, found {', '.join(names)}")
        if self.ordering not in ORDERINGS:
            raise ValueError(f"ordering={self.ordering!r}: choose one of {', '.join(ORDERINGS)}")
        if not isinstance(self.multi_token, bool):
            raise ValueError(f"multi_token={self.multi_token!r}: must be True or False")

    @property
    def max_quota(self) -> int:
        """The largest quota of a type. Text positions begin after it."""
        return max(kind.quota for kind in self.types)

    @property
    def groups(self) -> list[list[int]]:
        """The types that are written together, group by group."""
        types = list(range(len(self.types)))
        return [types] if self.ordering == "parallel" else [[i] for i in types]


def _concept_type(given: Any) -> ConceptTypeConfig:
    if isinstance(given, ConceptTypeConfig):
        return given
    try:
        return ConceptTypeConfig(**given)
    except TypeError as error:
        known = ", ".join(f.name for f in fields(ConceptTypeConfig))
        raise ValueError(f"types: {given!r} is not a ConceptTypeConfig; its fields are {known}") from error
