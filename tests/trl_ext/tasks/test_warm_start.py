"""Models that recipes make: published whole, by whichever run was first."""

import pytest

from trl_ext.tasks.warm_start import publish


def test_a_run_that_comes_second_takes_what_the_first_has_made(tmp_path):
    folder = tmp_path / "model"

    def make(part):
        (part / "weights").write_text("second")
        folder.mkdir()
        (folder / "weights").write_text("first")  # by another process, meanwhile

    publish(folder, make)
    assert (folder / "weights").read_text() == "first" and list(tmp_path.iterdir()) == [folder]


def test_a_run_that_fails_leaves_nothing(tmp_path):
    def make(part):
        (part / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path / "model", make)
    assert not list(tmp_path.iterdir())
