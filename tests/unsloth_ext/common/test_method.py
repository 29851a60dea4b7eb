"""Records of methods: a mistake in one is named with its file when the package is imported, and records are found in any
installation."""

import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace

import pytest

import unsloth_ext
from tests.test_house import ROOT
from unsloth_ext.common import method
from unsloth_ext.common.method import Method, all_methods, public_names


HRPO = all_methods()["hrpo"]


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"attribute": ""}, "a method that adds modules to a model also needs the fields attribute$"),
        ({"key": "", "attach": ""}, "also needs the fields key, attach$"),
        ({"attach": "attach_nothing"}, "attach='attach_nothing' is not among the exports"),
        ({"loader": "Nothing"}, "loader='Nothing' is not among the exports"),
        ({"settings": "Nothing"}, "settings='Nothing' is not among the exports"),
        ({"modules": "gate"}, "modules='gate' is not a tuple"),
        ({"refused_arguments": "top_k"}, "refused_arguments='top_k' is not a tuple"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(changes, said):
    with pytest.raises(ValueError, match=rf"^unsloth_ext/hrpo/method.py: .*{said}"):
        replace(HRPO, **changes)


def test_a_method_without_modules_needs_none_of_these_fields():
    assert Method(name="plain", exports={"f": "module"}).key == ""


@pytest.mark.parametrize(
    "field, value, said",
    [
        ("key", HRPO.key, "the key 'thinking'"),
        ("attribute", HRPO.attribute, "the attribute 'thinking_config'"),
        ("modules", HRPO.modules[-1:], f"the module '{HRPO.modules[-1]}'"),
    ],
)
def test_two_methods_that_a_saved_folder_could_not_tell_apart_are_refused(monkeypatch, field, value, said):
    other = replace(all_methods()["planner"], **{field: value})
    monkeypatch.setattr(method, "records", lambda package: {"hrpo": HRPO, "planner": other})
    with pytest.raises(ValueError, match=rf"^unsloth_ext/planner/method.py: {said} is that of hrpo already"):
        all_methods.__wrapped__()


def test_a_name_that_is_exported_twice_is_refused():
    methods = {"a": Method(name="a", exports={"f": "x"}), "b": Method(name="b", exports={"f": "y"})}
    with pytest.raises(ValueError, match=r"^unsloth_ext/b/method.py: the export f is that of a.x already"):
        public_names({}, methods)
    with pytest.raises(ValueError, match=r"^unsloth_ext/a/method.py: the export f is that of common.f already"):
        public_names({"f": "common.f"}, methods)
    assert public_names({"g": "common.g"}, {"a": methods["a"]}) == {"g": "common.g", "f": "a.x"}


def count(path) -> int:
    """How many public names the package has there, in a Python without other packages."""
    code = f"import sys; sys.path.insert(0, {str(path)!r}); import unsloth_ext; print(len(dir(unsloth_ext)))"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_records_are_found_in_a_zip_file_and_in_compiled_files(tmp_path):
    archive = tmp_path / "package.zip"
    with zipfile.ZipFile(archive, "w") as made:
        for file in (ROOT / "unsloth_ext").rglob("*.py"):
            made.write(file, file.relative_to(ROOT))
    assert count(archive) == len(unsloth_ext.__all__) > 50
    folder = tmp_path / "compiled"
    shutil.copytree(ROOT / "unsloth_ext", folder / "unsloth_ext", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "compileall", "-q", "-b", str(folder)], check=True)
    for file in folder.rglob("*.py"):
        file.unlink()
    assert count(folder) == len(unsloth_ext.__all__)
