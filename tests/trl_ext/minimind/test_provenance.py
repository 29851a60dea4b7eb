"""A stage that begins with what another one left hears what of that has changed since."""

import os
import shutil
from pathlib import Path

import pytest

from trl_ext.common.run_folder import begin
from trl_ext.minimind.provenance import changes, origin, remember


@pytest.fixture
def stages(tmp_path):
    """tokenizer -> pretrain -> sft: make(name) runs one with the recipe and configuration that are there."""
    before = {"pretrain": "tokenizer", "sft": "pretrain"}

    def make(name):
        folder, config = tmp_path / name, tmp_path / f"{name}.yaml"
        folder.mkdir(exist_ok=True)
        if not config.exists():
            config.write_text("max_steps: 2\n")
        recipe = tmp_path / f"{name}.py"
        recipe.write_text("main()\n")
        models = [str(tmp_path / before[name] / "final")] if name in before else []
        begin(folder, False)
        remember(folder, origin(recipe, config, models))
        return str(folder / "final")

    return make


def test_an_edit_is_heard_by_all_later_stages_until_they_are_made_anew(stages, tmp_path):
    last = [stages(name) for name in ("tokenizer", "pretrain", "sft")][-1]
    assert changes(last) == [] and changes("us/hub-id") == []
    (tmp_path / "pretrain.yaml").write_text("max_steps: 3\n")
    (said,) = changes(last)
    assert str(tmp_path / "pretrain") in said and "pretrain.yaml was edited since" in said
    assert "pretrain.py with --overwrite remakes it" in said
    stages("pretrain")
    (said,) = changes(last)
    assert f"{os.path.relpath(tmp_path / 'pretrain')} was remade since" in said and "sft.py with --overwrite" in said
    stages("tokenizer")
    assert len(changes(last)) == 2
    for name in ("pretrain", "sft"):
        stages(name)
    assert changes(last) == []


def test_where_the_command_is_given_does_not_matter(stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    origins = [stages(name) for name in ("tokenizer", "pretrain")]
    remember(tmp_path / "pretrain", origin(Path("pretrain.py"), Path("pretrain.yaml"), ["tokenizer/final"]))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert changes(origins[-1]) == []
    stages("tokenizer")
    assert "../tokenizer was remade since" in changes(origins[-1])[0]
    shutil.rmtree(tmp_path / "tokenizer")  # what is not there any more was not made anew
    assert changes(origins[-1]) == []


def test_stages_that_were_made_of_each_other(stages, tmp_path):
    first, second = stages("sft"), stages("dpo")
    for name, model in (("dpo", first), ("sft", second)):
        remember(tmp_path / name, origin(tmp_path / f"{name}.py", tmp_path / f"{name}.yaml", [model]))
    assert changes(first) == changes(second) == []
    (tmp_path / "sft.py").write_text("another")
    assert len(changes(first)) == len(changes(second)) == 1
