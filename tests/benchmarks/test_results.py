"""Results so far are taken up only by runs with the same settings."""

import json

import pytest

from benchmarks import setups


def test_results_of_other_settings_are_not_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(setups, "RESULTS", tmp_path)
    made_with = {"steps": 600, "runs": "a"}
    path, found = setups.so_far("x", False, made_with)
    assert found == {}
    path.write_text(json.dumps({"made_with": made_with, "results": {"all": {"0": 1}}}))
    assert setups.so_far("x", False, made_with)[1] == {"all": {"0": 1}}
    with pytest.raises(ValueError, match=r"other settings \(steps=600, now 10\): --fresh forgets"):
        setups.so_far("x", False, {**made_with, "steps": 10})
    assert setups.so_far("x", True, {**made_with, "steps": 10})[1] == {} and not path.exists()
