"""Which concepts a plan is made of, and how it is written."""

from dataclasses import dataclass, field, fields
from typing import Any


ORDERINGS = ("sequential", "parallel")


@dataclass
class ConceptTypeConfig:
    """One type of concept, with a vocabulary and an end of its own.

    Attributes:
        name: for logs.
        num_concepts: codewords V; `<EOS>` comes on top.
        quota: at most so many concepts a plan.
    """

    name: str = field(default="plan")
    num_concepts: int = field(default=256)
    quota: int = field(default=16)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ValueError(f"name={self.name!r}: a name for the type")
        for name in ("num_concepts", "quota"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}={value!r}: a whole number, at least 1")


@dataclass
class PlannerConfig:
    """How a model plans. Saved in `latent_reasoning.json` (a full model's
    `config.json` has it too).

    Attributes:
        types: of concepts, in the order in which plans hold them; dicts of `ConceptTypeConfig`'s fields will do.
        ordering: `"sequential"`, where a type sees those before it, or `"parallel"`, where each sees the text alone and
            step j writes concept j of all of them.
        multi_token: all concepts of a type in one pass, from learned queries; one does not see another then.
    """

    types: list[ConceptTypeConfig] = field(default_factory=lambda: [ConceptTypeConfig()])
    ordering: str = field(default="sequential")
    multi_token: bool = field(default=False)

    def __post_init__(self) -> None:
        if not isinstance(self.types, list | tuple) or not self.types:
            raise ValueError(f"types={self.types!r}: a list of at least one ConceptTypeConfig")
        self.types = [_concept_type(given) for given in self.types]
        names = [kind.name for kind in self.types]
        if len(set(names)) < len(names):
            raise ValueError(f"types: their names must differ, found {', '.join(names)}")
        if self.ordering not in ORDERINGS:
            raise ValueError(f"ordering={self.ordering!r}: choose one of {', '.join(ORDERINGS)}")
        if not isinstance(self.multi_token, bool):
            raise ValueError(f"multi_token={self.multi_token!r}: True or False")

    @property
    def max_quota(self) -> int:
        """The largest quota: text goes on behind it."""
        return max(kind.quota for kind in self.types)

    @property
    def groups(self) -> list[list[int]]:
        """Types that are written together, group by group."""
        each = list(range(len(self.types)))
        return [each] if self.ordering == "parallel" else [[i] for i in each]


def _concept_type(given: Any) -> ConceptTypeConfig:
    if isinstance(given, ConceptTypeConfig):
        return given
    try:
        return ConceptTypeConfig(**given)
    except TypeError as error:
        known = ", ".join(f.name for f in fields(ConceptTypeConfig))
        raise ValueError(f"types: {given!r} is no ConceptTypeConfig; its fields are {known}") from error
