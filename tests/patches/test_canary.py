"""The code of other packages that this project touches is code that was tested: what to read after an upgrade.

It is read as source, not imported: importing Unsloth takes long and changes the process.
"""

import importlib
import inspect
import logging

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import patches
from patches import fingerprints, touched, versions
from patches.base_model_forward import FAMILIES


def _skip_unless_installed(file):
    package = file.partition("/")[0]
    if versions.installed_version(package) is None:
        pytest.skip(f"{package} is not installed")


@pytest.mark.parametrize("place", touched.places())
def test_the_installed_code_was_tested(place):
    _skip_unless_installed(place)
    assert fingerprints.change(place) is None


@pytest.mark.parametrize(("file", "text", "why"), touched.RELIED_ON)
def test_the_text_is_there(file, text, why):
    _skip_unless_installed(file)
    assert fingerprints.contains(file, text), f"{file} lacks {text!r}: {why}"


def test_every_place_is_recorded_and_nothing_else():
    assert sorted(fingerprints.known()) == touched.places()
    assert all(fingerprints.known().values())


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_forward(family):
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    parameters = inspect.signature(inspect.unwrap(getattr(module, FAMILIES[family]).forward)).parameters
    assert list(parameters)[:2] == ["self", "input_ids"] and "inputs_embeds" in parameters


# -- newer versions than the tested ones ------------------------------------------------------------------------------


@pytest.fixture
def newer_trl(monkeypatch):
    """TRL seems to be newer than the tested versions."""
    monkeypatch.delenv(versions.ALLOW_UNTESTED, raising=False)
    monkeypatch.setitem(versions.TESTED, "trl", SpecifierSet(">=1.0,<1.2"))
    touched.changes.cache_clear()
    versions._warn_once.cache_clear()
    yield
    touched.changes.cache_clear()
    versions._warn_once.cache_clear()


@pytest.mark.parametrize(
    ("found", "wanted", "newer"),
    [
        ("1.16.0", ">=1.15,<1.17", False),
        ("1.17.0", ">=1.15,<1.17", True),
        ("1.17.0.dev0", ">=1.15,<1.17", True),
        ("1.16.0.dev0", ">=1.15,<1.17", True),  # its code decides
        ("1.15.0.dev0", ">=1.16,<1.17", False),
        ("1.14.9", ">=1.15,<1.17", False),
        ("0.33.0", "==0.31.*", True),
        ("0.30.2", "==0.31.*", False),
        ("2026.10.10", "==2026.10.9", True),
        ("2.15.0+cpu", ">=2.11,<2.15", True),
    ],
)
def test_what_newer_means(monkeypatch, found, wanted, newer):
    monkeypatch.setitem(versions.TESTED, "trl", SpecifierSet(wanted))
    monkeypatch.setattr(versions, "_version_of", lambda name: Version(found))
    assert versions.is_newer("trl") is newer


def test_a_newer_version_with_the_same_code_warns_once_and_goes_on(newer_trl, caplog):
    assert versions.version_problem("trl") is None
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            patches.apply("completions_table")
    patches.revert("completions_table")
    (warning,) = [record.getMessage() for record in caplog.records if "newer" in record.getMessage()]
    assert warning == versions.newer_note("trl") and "trl" in warning and "(<1.2,>=1.0)" in warning


@pytest.mark.parametrize("what", ["a function", "a text"])
def test_a_newer_version_with_other_code_is_refused_by_name(newer_trl, monkeypatch, what):
    if what == "a function":
        place = "trl/trainer/grpo_trainer.py:GRPOTrainer._compute_loss"
        changed = {**fingerprints.known(), place: {"0123456789ab": "1.1.0"}}
        monkeypatch.setattr(fingerprints, "known", lambda: changed)
    else:
        place = "trl/trainer/grpo_trainer.py lacks 'self._no_such_attribute'"
        row = ("trl/trainer/grpo_trainer.py", "self._no_such_attribute", "a test")
        monkeypatch.setattr(touched, "RELIED_ON", (*touched.RELIED_ON, row))
    # a package that is no extra is checked by the patches of others too
    for patch in ("completions_table", "base_model_forward"):
        before = patches.status()[patch].applied  # by tests that this process ran earlier
        with pytest.raises(versions.UntestedVersionError) as error:
            patches.apply(patch)
        assert place in str(error.value) and "is newer than the tested versions" in str(error.value)
        assert patches.status()[patch].applied == before
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "1")
    patches.apply("completions_table")
    patches.revert("completions_table")


@pytest.mark.parametrize(
    ("package", "wanted", "refused"),
    [("datasets", ">=1,<1.1", False), ("math-verify", "==0.1.0", True), ("datasets", ">=99", True)],
)
def test_of_a_package_with_no_code_that_is_compared(monkeypatch, package, wanted, refused):
    """A newer one goes on and says that nothing was compared; an exact pin, which fixes rewards or data, is kept."""
    monkeypatch.setitem(versions.TESTED, package, SpecifierSet(wanted))
    assert (versions.version_problem(package) is not None) is refused
    if not refused:
        assert "nothing was compared" in versions.newer_note(package)


def test_a_version_that_cannot_be_read_is_named(monkeypatch):
    for text in (None, "1.16-custom_build"):
        monkeypatch.setattr("importlib.metadata.version", lambda name, text=text: text)
        versions._version_of.cache_clear()
        with pytest.raises(versions.UntestedVersionError, match=r"trl has no readable version .*install it again"):
            versions.installed_version("trl")
    monkeypatch.undo()
    versions._version_of.cache_clear()


def test_doctor_tells_a_newer_version(newer_trl, capsys):
    from trl_ext.cli import doctor

    assert doctor.main() == 0
    out = capsys.readouterr().out
    assert "newer" in out and versions.newer_note("trl") in out.replace("\n", " ")


def test_installed_code_is_recorded(tmp_path, monkeypatch):
    file = tmp_path / "known_code.json"
    file.write_text(fingerprints.KNOWN.read_text())
    monkeypatch.setattr(fingerprints, "KNOWN", file)
    place = "trl/trainer/utils.py:print_prompt_completions_sample"
    before = dict(fingerprints.known())
    assert touched.record() == []  # all of it is known
    assert fingerprints.known() == before
    file.write_text(file.read_text().replace(fingerprints.installed(place), "0123456789ab"))
    fingerprints.known.cache_clear()
    touched.changes.cache_clear()
    (sentence,) = touched.changes("trl")
    assert place in sentence and "0123456789ab" in sentence
    assert touched.record() == [place]
    assert fingerprints.known()[place].keys() >= {"0123456789ab", fingerprints.installed(place)}
    assert touched.changes("trl") == ()
    monkeypatch.undo()
    fingerprints.known.cache_clear()
    touched.changes.cache_clear()
