"""Results so far are taken up only by runs with the same settings; their pages are what their figures give."""

import json

import pytest

from benchmarks import setups, tables


def test_results_of_other_settings_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(setups, "RESULTS", tmp_path)
    made_with = {"steps": 600, "runs": "a"}
    path, found = setups.so_far("x", False, made_with)
    assert found == {}
    path.write_text(json.dumps({"made_with": made_with, "results": {"all": {"0": 1}}}))
    assert setups.so_far("x", False, made_with)[1] == {"all": {"0": 1}}
    with pytest.raises(ValueError, match=r"other settings \(steps=600, now 10\): --fresh deletes"):
        setups.so_far("x", False, {**made_with, "steps": 10})
    assert setups.so_far("x", True, {**made_with, "steps": 10})[1] == {} and not path.exists()


def test_every_page_of_results_is_what_its_figures_give():
    found = tables.pages()
    assert len(found) > 10
    assert {path: path.read_text() for path in found} == found
    figures = {path for path in setups.RESULTS.glob("*.json") if not path.stem.startswith("gpu_check_")}
    assert {path.with_suffix(".json") for path in found} == figures
