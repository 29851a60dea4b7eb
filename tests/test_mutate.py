"""The script that changes the method code: it changes one place, in memory, and hears what the tests say."""

import inspect
import json

import pytest

from tests import mutate
from tests.mutate import Mutant, Mutator, attempt, mutants_of, swap
from unsloth_ext.hrpo import states


FILE = mutate.ROOT / "unsloth_ext" / "hrpo" / "states.py"


def chosen(function: str, before: str) -> Mutant:
    return next(m for m in mutants_of(FILE) if m.function == function and m.before == before)


def test_every_place_is_one_change():
    import ast

    found = mutants_of(FILE)
    assert len(found) == len({(m.index,) for m in found}) > 30
    source = ast.unparse(ast.parse(FILE.read_text()))
    changed = {ast.unparse(Mutator(m.index).visit(ast.parse(FILE.read_text()))) for m in found}
    assert source not in changed and len(changed) > 0.9 * len(found)  # two places may read alike once changed
    assert all(m.before != m.after and m.function for m in found)


def test_it_is_swapped_in_memory():
    """A function that others have imported already is another one; one file line has not moved."""
    mutant = chosen("normalise", "norm != 'none'")
    code = states.normalise.__code__
    try:
        swap(mutant)
        assert states.normalise.__code__ is not code
        assert states.normalise.__code__.co_firstlineno == code.co_firstlineno
    finally:
        states.normalise.__code__ = code
    assert inspect.unwrap(states.normalise).__code__ is code


@pytest.mark.slow
def test_a_test_that_looks_kills_it_and_one_that_does_not_lets_it_live(tmp_path):
    looks, idle = tmp_path / "test_looks.py", tmp_path / "test_idle.py"
    body = "from unsloth_ext.hrpo.states import Warper\n\n\ndef test_it():\n    warper = Warper(1.0, {}, 1.0, None)\n"
    looks.write_text(body.format(2) + "    assert warper.truncates\n")
    idle.write_text(body.format(None) + "    assert warper is not None\n")
    mutant = chosen("Warper.__init__", "bool(top_k) or (top_p or 1.0) < 1.0 or bool(min_p)")
    assert attempt((mutant, [str(looks)], 120))[1] == "killed"
    assert attempt((mutant, [str(idle)], 120))[1] == "survived"


def test_a_test_that_fails_without_the_mutant_too_says_nothing_of_it(monkeypatch):
    fail = {"always": lambda mutant: True, "looks": lambda mutant: mutant is not None, "idle": lambda mutant: False}
    monkeypatch.setattr(mutate, "KNOWN", {})
    monkeypatch.setattr(
        mutate, "first_failure", lambda tests, _, mutant=None: next((t for t in tests if fail[t](mutant)), None)
    )
    for tests, outcome in ((["idle", "always"], "survived"), (["always", "looks"], "killed"), (["always"], "survived")):
        assert attempt((chosen("normalise", "norm != 'none'"), tests, 120))[1] == outcome
    assert mutate.KNOWN == {"always": False, "looks": True}


def test_accepted_mutants_are_still_possible_and_have_a_reason():
    accepted = json.loads(mutate.ACCEPTED.read_text()) if mutate.ACCEPTED.exists() else {}
    possible = {
        m.key() for p in mutate.METHOD_CODE for file in (mutate.ROOT / p).rglob("*.py") for m in mutants_of(file)
    }
    assert [key for key in accepted if key not in possible] == []
    assert all(len(reason) > 10 for reason in accepted.values())


def test_nothing_outside_functions_and_no_message_is_changed():
    with pytest.raises(StopIteration):
        chosen("", "'projection'")
    assert not any(
        "choose" in m.before for file in (FILE, mutate.ROOT / "trl_ext" / "cli" / "flags.py") for m in mutants_of(file)
    )
