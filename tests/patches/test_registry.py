"""Apply, revert, status, and everything that must be an error."""

import subprocess
import sys
import threading
import types

import pytest

import patches
from patches import registry, versions
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
        reason="a test",
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
    assert len(patch.originals) == 1 and module.double(3) == 7
    patches.revert("fused_lm_head")
    assert module.double is double


def test_untested_versions_are_refused_unless_allowed(target, monkeypatch):
    from packaging.specifiers import SpecifierSet

    monkeypatch.setitem(versions.TESTED, "torch", SpecifierSet("==1.0"))
    with pytest.raises(versions.UntestedVersionError, match=r"pip install 'torch==1\.0'.*LATENT_ALLOW_UNTESTED"):
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


def test_live_status_has_a_fingerprint_of_what_was_replaced():
    with patches.applied("base_model_forward"):
        status = patches.status()["base_model_forward"]
        assert status.live and status.applied >= 6 and len(status.fingerprint) == 12


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
    monkeypatch.setitem(versions.TESTED, "trl", SpecifierSet("==9.9"))
    assert doctor.main() == 1
    assert "pip install 'trl==9.9'" in capsys.readouterr().out.replace("\n", " ")
    monkeypatch.setenv(versions.ALLOW_UNTESTED, "1")
    assert doctor.main() == 0
