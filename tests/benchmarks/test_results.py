"""Results so far are taken up only by runs with the same settings; their pages are what their figures give."""

import json
import sys

import pytest

from benchmarks import over_seeds, setups, tables
from trl_ext.common.fingerprint import digest


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


def test_runs_are_added_to_a_file_but_not_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(setups, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["bench", "--seeds", "0", "--only", "a"])
    path = tmp_path / "x_cpu.json"
    kept = {"score": 0.5, "made_with": digest({"rate": 1})}
    header = {"device": "cpu", "threads": 1, "machine": "m", "versions": {}, "command": "c"}
    text = {**header, "made_with": {"steps": 3, "held_out": "9"}, "results": {"a": {"0": kept}}}
    path.write_text(json.dumps(text))

    def compare(runs):
        over_seeds.compare("About.", "x", runs, repeated, 3, (("score", "score", ".1f"),), "9", lambda found: "page")

    compare({"a": {"rate": 1}, "b": {"rate": 2}})
    assert "| a | 0.5 |" in capsys.readouterr().out
    with pytest.raises(ValueError, match="the settings of a are other ones now: --fresh deletes all results"):
        compare({"a": {"rate": 2}})


def repeated(name, seed, steps):
    raise AssertionError("a finished run was repeated")
