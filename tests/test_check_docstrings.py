"""Each rule of `check_docstrings` finds a docstring that breaks it."""

import ast
import textwrap

import pytest

from . import check_docstrings


GOOD = '''
def score(model: nn.Module, states: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
    """Score states (arXiv 2510.02312, eq. 4).

    Args:
        model: a causal LM.
        states (B, T, d): one for each token,
            floating point.
        scale: divides the scores.

    Returns:
        (B, T) fp32.

    Raises:
        ValueError: `scale` is 0.
    """
    def inner():
        raise KeyError

    if not scale:
        raise ValueError("scale=0")
'''

CLASS = '''
class Scorer:
    """Scores of ours.

    Args:
        width: d.
        scale: divides the scores.

    Raises:
        ValueError: `scale` is 0.
    """

    def __init__(self, width: int, scale: float):
        if not scale:
            raise ValueError("scale=0")

    def score(self, states: torch.Tensor) -> torch.Tensor:
        """Scores (B, T) of states (B, T, d), in the dtype of the states."""

    def _private(self, a, b): ...

    def on_log(self, args, state): ...
'''

DATACLASS = '''
@dataclass(frozen=True)
class Scores:
    """Scores of ours.

    Attributes:
        best (B,): long.
        scale: divides them.

    Raises:
        ValueError: `scale` is 0.
    """

    best: torch.Tensor
    scale: float = 1.0
    rate: float = field(default=1.0, metadata={"help": "of learning"})

    def __post_init__(self):
        if not self.scale:
            raise ValueError("scale=0")
'''


def problems(source: str) -> list[str]:
    (node,) = ast.parse(textwrap.dedent(source)).body
    return [f"{name}: {problem}" for name, _, problem in check_docstrings.problems(node, mathematics=True)]


@pytest.mark.parametrize("source", [GOOD, CLASS, DATACLASS])
def test_complete_docstrings_have_no_problem(source):
    assert problems(source) == []


@pytest.mark.parametrize(
    "source, old, new, expected",
    [
        (GOOD, "        model: a causal LM.\n", "", "score: Args: has no entry `model: ...`"),
        (GOOD, "scale: divides", "scale divides", "score: Args: has no entry `scale: ...`"),
        (GOOD, "states (B, T, d): one", "states: one", "score: Args: does not state the shape of states"),
        (GOOD, "            floating point.\n", "", "score: Args: does not state the dtype of states"),
        (GOOD, "    Returns:\n        (B, T) fp32.\n", "", "score: has no `Returns:`"),
        (GOOD, "(B, T) fp32", "fp32", "score: Returns: does not state the shape"),
        (GOOD, "(B, T) fp32", "(B, T)", "score: Returns: does not state the dtype"),
        (GOOD, "-> torch.Tensor", "-> Iterator[torch.Tensor]", "score: has no `Yields:`"),
        (GOOD, "    Raises:\n        ValueError: `scale` is 0.\n", "", "score: Raises: has no entry `ValueError: ...`"),
        (GOOD, "arXiv 2510.02312, eq. 4", "a paper", "score: names no source"),
        (CLASS, "        width: d.\n", "", "Scorer: Args: has no entry `width: ...`"),
        (CLASS, "ValueError: `scale`", "KeyError: `scale`", "Scorer: Raises: has no entry `ValueError: ...`"),
        (CLASS, '"""Scores (B, T) of', "pass  #", "Scorer.score: has no docstring"),
        (CLASS, "Scores (B, T) of states", "Scores of states", "Scorer.score: does not state the shape and dtype"),
        (CLASS, ", in the dtype of the states", "", "Scorer.score: does not state the shape and dtype"),
        (CLASS, "Scores of ours", "Scores", "Scorer.score: names no source"),
        (CLASS, "on_log", "log", "Scorer.log: has no docstring"),
        (DATACLASS, "        scale: divides them.\n", "", "Scores: Attributes: has no entry `scale: ...`"),
        (DATACLASS, "best (B,): long", "best: long", "Scores: Attributes: does not state the shape of best"),
        (DATACLASS, "best (B,): long", "best (B,): indices", "Scores: Attributes: does not state the dtype of best"),
        (
            DATACLASS,
            "    Raises:\n        ValueError: `scale` is 0.\n",
            "",
            "Scores: Raises: has no entry `ValueError: ...`",
        ),
    ],
)
def test_each_rule_finds_what_breaks_it(source, old, new, expected):
    assert source.count(old) == 1
    found = problems(source.replace(old, new))
    assert any(problem.startswith(expected) for problem in found), found


def test_a_missing_docstring_is_found():
    assert problems("def score(states): ...") == ["score: has no docstring"]
    assert problems("class Scorer: ...") == ["Scorer: has no docstring"]


@pytest.mark.parametrize("text", ["(linear attention, state spaces)", "(MLA)", "(arXiv 2510.02312)", "(see below)"])
def test_parentheses_in_prose_are_no_shape(text):
    assert not check_docstrings.SHAPE.search(text)


@pytest.mark.parametrize(
    "text", ["(B, T, d)", "(N,)", "(...)", "(..., d)", "(B, n, V_i + 1)", "(B * K, T')", "a scalar"]
)
def test_shapes_are_found(text):
    assert check_docstrings.SHAPE.search(text)


def test_every_public_name_is_looked_at():
    """All but constants and names that a package takes from another one."""
    import patches
    import trl_ext
    import unsloth_ext

    names = {f"{package.__name__}.{name}" for package in (patches, unsloth_ext, trl_ext) for name in package.__all__}
    skipped = {"patches.NAMES", "trl_ext.LatentReasoningModule", "trl_ext.RKVCompressor"}
    assert {name for name, *_ in check_docstrings.public()} == names - skipped


def test_the_check_fails_with_a_problem_alone(monkeypatch, capsys):
    monkeypatch.setattr(check_docstrings, "public", lambda: iter(()))
    assert check_docstrings.main() == 0 and not capsys.readouterr().out

    file = check_docstrings.ROOT / "unsloth_ext" / "hrpo" / "states.py"
    node = ast.parse("def score(): ...").body[0]
    monkeypatch.setattr(check_docstrings, "public", lambda: iter([("x.score", file, node, ast.parse(""))]))
    assert check_docstrings.main() == 1
    assert "unsloth_ext/hrpo/states.py:1: score: has no docstring" in capsys.readouterr().out
