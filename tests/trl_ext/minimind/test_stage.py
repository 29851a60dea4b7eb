"""What a stage trains on and what it holds out."""

import json

import pytest

from trl_ext.minimind.stage import StageArguments
from trl_ext.tasks.files import DataError

from . import setups


def dialogues(path, numbers):
    rows = [{"conversations": setups.turns(f"{i}?", str(i))} for i in numbers]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("kind", ["sft", "rl"])
def test_nothing_that_is_held_out_is_trained_on(tmp_path, caplog, kind):
    file, other = dialogues(tmp_path / "mine.jsonl", [0, 1, 2, 3, 1, 4]), dialogues(tmp_path / "eval.jsonl", [3, 5, 0])
    for given, left, held in (
        ({"eval_size": 2}, [0, 2, 3], [1, 4]),
        ({"eval_dataset": other}, [1, 2, 1, 4], [3, 5, 0]),
        ({"eval_dataset": other, "eval_size": 1}, [0, 1, 2, 1, 4], [3]),
    ):
        caplog.clear()
        rows = StageArguments(dataset=file, run_dir=str(tmp_path), **given).load("sft", kind)
        asked = [[int(turns[0]["content"][:-1]) for turns in side[side.column_names[0]]] for side in rows]
        assert asked == [left, held]
        assert f"{6 - len(left) - (2 if 'eval_dataset' not in given else 0)} of its rows are held out" in caplog.text
    assert [
        len(side) for side in StageArguments(dataset=other, run_dir=str(tmp_path), eval_size=2).load("sft", kind)
    ] == [1, 2]
    with pytest.raises(DataError, match=r"3 row\(s\), and eval_size=3 are held out"):
        StageArguments(dataset=other, run_dir=str(tmp_path), eval_size=3).load("sft", kind)
    with pytest.raises(DataError, match="all of its 6 training rows are held out too"):
        StageArguments(dataset=file, eval_dataset=file, run_dir=str(tmp_path)).load("sft", kind)
