"""Apply, revert, status, and everything that must be an error."""

import gc
import hashlib
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path

import pytest

import patches
from patches import fingerprints, registry, versions
from tests.marks import slow


@pytest.fixture
def target(monkeypatch):
    """A module of somebody else's with one function, and a patch of ours for it."""
    module = types.ModuleType("upstream")

    def double(x, factor=2):
        return x * factor

    module.double = double
    patch = registry.Patch(
        name="fused_lm_head",  # any listed name: the registry looks it up
        package="torch",
        target="upstream.double",
        parameters=("x", "factor"),
        sites=lambda *owners: [(owner, "double") for owner in owners or (module,)],
        wrap=lambda original: lambda x, factor=2: original(x, factor) + 1,
        places=(),
        effect="Adds one.",
        reason="a test",
        upstream="no upstream issue is known",
        removable="when the test ends",
    )
    monkeypatch.setattr(registry, "get", lambda name: patch)
    return module, double, patch


def test_apply_is_idempotent_and_revert_restores_the_object(target):
    module, double, _ = target
    patches.apply("fused_lm_head")
    patches.apply("fused_lm_head")
    assert module.double(3) == 7
    patches.revert("fused_lm_head")
    assert module.double is double
    patches.revert("fused_lm_head")
    assert module.double is double


def test_inherited_attributes_are_deleted_again(target):
    _, double, _ = target

    Parent = type("Parent", (), {"double": staticmethod(double)})
    Child = type("Child", (Parent,), {})

    patches.apply("fused_lm_head", Child)
    assert "double" in vars(Child) and "double" in vars(Parent)
    patches.revert("fused_lm_head")
    assert "double" not in vars(Child) and Child.double is double


def test_context_manager_restores_what_was(target):
    module, double, _ = target
    with patches.applied("fused_lm_head"):
        assert module.double(3) == 7
        with patches.applied("fused_lm_head"):
            assert module.double(3) == 7
        assert module.double(3) == 7
    assert module.double is double


def test_context_manager_restores_after_an_error(target):
    module, double, _ = target
    with pytest.raises(ZeroDivisionError), patches.applied("fused_lm_head"):
        raise ZeroDivisionError
    assert module.double is double


@pytest.mark.parametrize("permanent", [False, True])
def test_a_patch_that_fails_at_one_site_changes_none(target, permanent):
    module, double, patch = target

    def fixed(x, factor=2):
        return x

    other = types.SimpleNamespace(double=fixed)
    wrap = patch.wrap

    def wrap_all_but_one(original):
        if original is fixed:
            raise RuntimeError("this one cannot be wrapped")
        return wrap(original)

    patch.wrap = wrap_all_but_one
    with pytest.raises(RuntimeError, match="cannot be wrapped"):
        if permanent:
            patches.apply("fused_lm_head", module, other)
        else:
            with patches.applied("fused_lm_head", module, other):
                pass
    assert module.double is double and other.double is fixed and not patch.changes


def test_changed_signature_names_target_and_parameters(target):
    module, _, _ = target
    module.double = lambda x, times: x * times
    with pytest.raises(patches.SignatureChangedError, match=r"upstream\.double\(x, factor\).*now takes \(x, times\)"):
        patches.apply("fused_lm_head")


def test_somebody_else_on_top_is_noticed(target):
    module, double, _ = target
    patches.apply("fused_lm_head")
    module.double = double
    with pytest.raises(patches.PatchError, match="another function runs there now"):
        patches.verify("fused_lm_head")
    patches.revert("fused_lm_head")


def test_unknown_names_list_the_known_ones():
    with pytest.raises(patches.UnknownPatchError, match=r"no patch is called 'nope'.*fused_lm_head"):
        patches.apply("nope")


def test_threads_apply_once(target):
    module, double, patch = target
    threads = [threading.Thread(target=patches.apply, args=("fused_lm_head",)) for _ in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(patch.changes) == 1 and module.double(3) == 7
    patches.revert("fused_lm_head")
    assert module.double is double


def test_untested_versions_are_refused_unless_allowed(target, monkeypatch):
    from packaging.specifiers import SpecifierSet

    monkeypatch.setitem(versions.TESTED, "torch", SpecifierSet("==9.0"))
    with pytest.raises(versions.UntestedVersionError, match=r"pip install 'torch==9\.0'.*LATENT_ALLOW_UNTESTED"):
        patches.apply("fused_lm_head")
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "1")
    patches.apply("fused_lm_head")
    patches.revert("fused_lm_head")


def test_status_names_every_patch_and_imports_nothing():
    code = (
        "import sys, patches; s = patches.status(); assert set(s) == set(patches.NAMES);"
        "assert not any(x.live or x.applied for x in s.values());"
        "assert not {'trl', 'unsloth', 'unsloth_zoo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_live_status_says_how_many_sites_are_changed():
    with patches.applied("base_model_forward"):
        status = patches.status()["base_model_forward"]
        assert status.live and status.applied >= 6


@pytest.mark.parametrize(
    "order",
    [
        slow("import trl; patches.apply('fused_lm_head')"),
        slow("patches.apply('fused_lm_head'); import trl"),
    ],
)
def test_the_order_of_imports_does_not_matter(order):
    code = (
        f"import patches; {order}; import trl.trainer.utils as u; assert patches.status()['fused_lm_head'].live;"
        "print(u._ChunkedLogProbFunction.apply.__module__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "fused_lm_head" in done.stdout


def test_doctor_names_the_first_bad_pair(monkeypatch, capsys):
    from packaging.specifiers import SpecifierSet

    from trl_ext.cli import doctor

    assert doctor.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert {f"    in {patches.get(name).target}" for name in patches.NAMES} <= set(lines)  # whole, to be copied
    monkeypatch.setitem(versions.TESTED, "trl", SpecifierSet(">=9.9"))
    assert doctor.main() == 1
    assert "pip install 'trl>=9.9'" in capsys.readouterr().out.replace("\n", " ")
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "1")
    assert doctor.main() == 0


# -- blocks that overlap ----------------------------------------------------------------------------------------------


def test_blocks_that_overlap_leave_nothing_behind(target):
    """The first to be opened is the first to be closed, as two threads may do it."""
    module, double, patch = target
    first, second = patches.applied("fused_lm_head"), patches.applied("fused_lm_head")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert module.double(3) == 7  # the second still needs it
    second.__exit__(None, None, None)
    assert module.double is double and not patch.changes


def test_a_block_leaves_what_was_applied_and_undoes_its_own_owners(target):
    module, double, _ = target
    other = types.SimpleNamespace(double=double)
    patches.apply("fused_lm_head")
    with patches.applied("fused_lm_head", other):
        assert other.double(3) == 7
        patches.apply("fused_lm_head", module)
    assert other.double is double and module.double(3) == 7
    patches.revert("fused_lm_head")
    assert module.double is double


def test_a_patch_applied_inside_a_block_stays(target):
    module, double, _ = target
    with patches.applied("fused_lm_head"):
        patches.apply("fused_lm_head")
    assert module.double(3) == 7
    patches.revert("fused_lm_head")
    assert module.double is double


def test_the_registry_keeps_nobody_alive(target):
    _, double, _ = target

    class Owner:
        pass

    owner = Owner()
    owner.double = double
    patches.apply("fused_lm_head", owner)
    seen = weakref.ref(owner)
    del owner
    gc.collect()
    assert seen() is None and patches.status()["fused_lm_head"].applied == 0
    patches.verify("fused_lm_head")
    patches.revert("fused_lm_head")


# -- switches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def switch(monkeypatch):
    """A flag of somebody else's, and a record of ours for it."""
    module = types.SimpleNamespace(FLAG="theirs")
    record = registry.Switch(
        name="unsloth_decode_graphs",
        package="torch",
        target="upstream.FLAG",
        sites=lambda *owners: [(owner, "FLAG") for owner in owners or (module,)],
        value=lambda: "ours",
        places=(),
        effect="Sets a flag.",
        reason="a test",
        upstream="no upstream issue is known",
        removable="when the test ends",
    )
    monkeypatch.setattr(registry, "get", lambda name: record)
    return module, record


@pytest.mark.parametrize("before", [{}, {"FLAG": "theirs"}])
@pytest.mark.parametrize("kind", [dict, lambda values: types.SimpleNamespace(**values)])
def test_a_switch_is_set_and_put_back(switch, before, kind):
    """On an attribute or a key of a mapping, also where there was none before."""
    owner = kind(before)
    values = owner if isinstance(owner, dict) else vars(owner)
    with patches.applied("unsloth_decode_graphs", owner):
        assert values == {"FLAG": "ours"} and patches.status()["unsloth_decode_graphs"].live
        with patches.applied("unsloth_decode_graphs", owner):
            pass
        assert values == {"FLAG": "ours"}
    assert values == before


def test_a_switch_that_somebody_else_turned_is_noticed(switch):
    module, _ = switch
    patches.apply("unsloth_decode_graphs")
    module.FLAG = "another"
    assert not patches.status()["unsloth_decode_graphs"].live
    with pytest.raises(patches.PatchError, match="it has another value now"):
        patches.apply("unsloth_decode_graphs")
    patches.revert("unsloth_decode_graphs")
    assert module.FLAG == "theirs"


# -- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", patches.NAMES)
def test_a_record_says_what_why_and_until_when(name):
    patch = patches.get(name)
    assert patch.name == name and patch.package in versions.TESTED
    for text in (patch.target, patch.effect, patch.reason, patch.upstream, patch.removable):
        assert text and text == text.strip()
    assert "https://github.com/" in patch.upstream or patch.upstream.startswith("no upstream issue is known")
    assert patch.places


def test_names_are_the_files_that_hold_a_record():
    folder = Path(registry.__file__).parent
    assert [path.stem for path in sorted(folder.glob("*.py")) if "\nPATCH = " in path.read_text()] == list(
        patches.NAMES
    )


@pytest.mark.parametrize("name", patches.NAMES)
def test_the_installed_code_is_the_one_a_patch_was_written_for(name):
    if versions.installed_version(patches.get(name).package) is None:
        pytest.skip(f"{patches.get(name).package} is not installed")
    assert patches.status()[name].warnings == ()


def test_other_upstream_code_is_a_warning_with_both_fingerprints(monkeypatch, capsys):
    from trl_ext.cli import doctor

    place = "trl/trainer/utils.py:print_prompt_completions_sample"
    now, gone = fingerprints.installed(place), "trl/trainer/utils.py:no_such_function"
    changed = {**fingerprints.known(), place: {"0123456789ab": "1.0.0"}}
    monkeypatch.setattr(fingerprints, "known", lambda: changed)
    monkeypatch.setattr(patches.get("completions_table"), "places", (place, gone))
    status = patches.status()["completions_table"]
    assert status.fingerprint == now and len(now) == 12
    first, second = status.warnings
    assert place in first and "0123456789ab" in first and now in first
    assert gone in second and "is not there any more" in second
    patches.apply("completions_table")  # a warning, not an error: this version was tested
    patches.revert("completions_table")
    assert doctor.main() == 0
    assert f"warning: {first}" in capsys.readouterr().out


def test_a_fingerprint_is_of_the_source_and_nothing_else(tmp_path, monkeypatch):
    folder = tmp_path / "upstream_package"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "code.py").write_text("X = 1\n\n\nclass A:\n    @property\n    def f(self):\n        return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    fingerprints._sources.cache_clear()
    found = fingerprints.installed("upstream_package/code.py:A.f")
    source = "    @property\n    def f(self):\n        return 1"
    assert found == hashlib.sha256(source.encode()).hexdigest()[:12]
    for missing in ("upstream_package/code.py:A.g", "upstream_package/other.py:A.f", "no_such_package/code.py:f"):
        assert fingerprints.installed(missing) == ""


@pytest.mark.parametrize(
    ("code", "same"),
    [
        ('def f(x: \'str\' = \'a#b\') -> 1:  # why\n    """What.\n\n    More.\n    """\n\n    return x\n', True),
        ("def f(x: int = 'a#b') -> None:\n    'ü'  # ü\n    return x  # ü\n", True),
        ("def f(\n    x: int = 'a#b') -> None:\n    return x\n", False),  # where lines break counts
        ("def f(x: int = 'a#c') -> None:\n    return x\n", False),
        ("@cache\ndef f(x: int = 'a#b') -> None:\n    return x\n", False),
        ("def f(x: int = 'a#b') -> None:\n    if x:\n        return x\n", False),
    ],
)
def test_comments_docstrings_and_what_annotations_say_do_not_count(tmp_path, monkeypatch, code, same):
    monkeypatch.syspath_prepend(tmp_path)
    found = []
    for folder, text in (("upstream_a", "def f(x: int = 'a#b') -> None:\n    return x\n"), ("upstream_b", code)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").write_text(text)
        found.append(fingerprints.installed(f"{folder}/__init__.py:f"))
    fingerprints._sources.cache_clear()
    assert found[0] and (found[0] == found[1]) is same
