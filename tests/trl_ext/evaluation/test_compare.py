"""Two evaluations against each other."""

import json
from math import comb

import pytest

from trl_ext.evaluation import compare


def result(right, samples=1, **changes):
    share = sum(right) / len(right) / samples
    found = {"task": "sums", "state": "on", "n": len(right), "samples": samples, "accuracy": share, "right": right}
    return {**found, "questions": "abc", **changes}


def evaluation(folder, *results, checkpoint="a"):
    folder.mkdir(exist_ok=True)
    (folder / "eval.json").write_text(json.dumps({"checkpoint": checkpoint, "results": results}))
    return str(folder)


def test_mcnemars_exact_test_by_hand():
    """Nine questions better, two worse, nine the same: twice the binomial tail of 9 to 11 of 11."""
    first, second = [0] * 9 + [1] * 2 + [1] * 9, [1] * 9 + [0] * 2 + [1] * 9
    gain, low, high, p = compare.paired(result(first), result(second))
    assert gain == pytest.approx(7 / 20) and low < gain < high
    assert p == pytest.approx(2 * sum(comb(11, k) for k in (9, 10, 11)) / 2**11)


def test_several_texts_are_permuted_within_questions():
    """Four questions, all better by the same: 2 of 16 permutations are as extreme."""
    gain, _, _, p = compare.paired(result([0, 1, 2, 1], 4), result([2, 3, 4, 3], 4))
    assert gain == 0.5 and p == pytest.approx(2 / 16)


def test_equal_evaluations_do_not_differ():
    assert compare.paired(result([1, 0, 1]), result([1, 0, 1])) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"right": [1, 0], "n": 2}, "other questions"),
        ({"samples": 2}, "other texts"),
        ({"questions": "x"}, "other questions"),
    ],
)
def test_other_questions_are_refused(changes, said):
    with pytest.raises(ValueError, match=f"sums: the two evaluations have {said}"):
        compare.paired(result([1, 0, 1]), {**result([1, 0, 1]), **changes})


def test_the_command(tmp_path, capsys):
    one = evaluation(tmp_path / "a", result([0, 0, 1, 0]), result([1, 1, 1, 1], state="off"))
    two = evaluation(tmp_path / "b", result([1, 1, 1, 1]), checkpoint="b")
    assert compare.main([one, f"{two}/eval.json"]) == 0
    printed = capsys.readouterr().out
    assert "a (on) against b (on)" in printed
    assert "│ sums │ 4 │ 25.0% │ 100.0% │ +75.0% (+25.0% to +100.0%) │ 0.25 │" in printed
    assert compare.main([one, one, "--with_state", "off"]) == 0
    assert "a (on) against a (off)" in capsys.readouterr().out


def test_what_cannot_be_compared_is_told(tmp_path):
    one = evaluation(tmp_path / "a", result([0, 1]))
    two = evaluation(tmp_path / "b", result([0, 1], task="facts"))
    with pytest.raises(ValueError, match=r"no task is in both: \[\('sums', 'on'\)\] with state on"):
        compare.main([one, two])
    with pytest.raises(ValueError, match="there is no such file; latent-reasoning eval writes it"):
        compare.main([one, str(tmp_path / "c")])
    for text in ("[]", "x", '{"checkpoint": 1, "results": [{}]}', '{"checkpoint": 1, "results": null}'):
        (tmp_path / "x.json").write_text(text)
        with pytest.raises(ValueError, match=r"x.json: not written by latent-reasoning eval"):
            compare.main([one, str(tmp_path / "x.json")])


def test_what_is_in_one_only_and_decoded_otherwise_is_told(tmp_path, capsys):
    one = evaluation(tmp_path / "a", result([0, 1]), result([0, 1], task="facts"))
    two = evaluation(tmp_path / "b", result([0, 1]), result([0], task="svamp", n=1))
    found = json.loads((tmp_path / "b" / "eval.json").read_text())
    (tmp_path / "b" / "eval.json").write_text(json.dumps({**found, "flags": {"temperature": 0.5}}))
    compare.main([one, two])
    printed = capsys.readouterr().out
    assert "Only in one of them, with these latent steps: facts, svamp" in printed
    assert "The texts were decoded otherwise: temperature None and 0.5" in printed
