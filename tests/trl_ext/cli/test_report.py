"""What a run leaves to look at."""

from types import SimpleNamespace

import pytest

from trl_ext.cli.report import CompactProgress, plot_curves, pyplot_for_files


def test_a_title_from_outside_and_whole_steps(tmp_path, monkeypatch):
    pyplot, drawn = pyplot_for_files(), []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    plot_curves(tmp_path / "curves.png", history, [], r"HRPO, $\frac{, [/nope]", (("loss", "loss"),))
    (figure,) = drawn
    ticks = figure.axes[0].get_xticks()
    assert all(tick == int(tick) for tick in ticks) and (tmp_path / "curves.png").stat().st_size > 5_000
    assert figure.get_suptitle() == r"HRPO, $\frac{, [/nope]"


def test_a_letter_that_the_font_does_not_have_is_no_warning(tmp_path, recwarn):
    history = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}]
    plot_curves(tmp_path / "curves.png", history, [], "HRPO, \u6a21\u578b", (("loss", "loss"),))
    assert not recwarn.list


@pytest.mark.parametrize("panels, columns, rows", [(1, 1, 1), (2, 2, 1), (4, 2, 2), (5, 3, 2), (6, 3, 2)])
def test_the_lowest_panel_of_each_column_numbers_its_steps(tmp_path, monkeypatch, panels, columns, rows):
    pyplot, drawn = pyplot_for_files(), []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    names = [f"loss/{i}" for i in range(panels)]
    history = [{"step": step, **dict.fromkeys(names, 1.0)} for step in (1, 2)]
    plot_curves(tmp_path / "curves.png", history, [], "", [(name, name) for name in names])
    (figure,) = drawn
    shown = figure.axes[:panels]
    assert all(axis.get_xlabel() == "step" for axis in shown[-columns:]) and len(figure.axes) == columns * rows
    assert all(axis.xaxis.get_tick_params()["labelbottom"] for axis in shown[-columns:])


def test_a_file_gets_lines_in_place_of_bars(capsys):
    progress = CompactProgress()
    progress.training_bar = SimpleNamespace(disable=True)
    state = SimpleNamespace(is_world_process_zero=True, global_step=3, max_steps=90)
    progress.on_log(None, state, None, {"loss": 0.5, "reward": 0.25, "epoch": 1.0})
    assert capsys.readouterr().out == "step 3 of 90  reward 0.250  loss 0.500\n"
    progress.on_log(None, state, None, {"loss": -0.0001})
    assert capsys.readouterr().out == "step 3 of 90  loss 0.000\n"


def test_what_is_never_negative_has_no_axis_below_zero(tmp_path, monkeypatch):
    pyplot, drawn = pyplot_for_files(), []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    history = [{"step": step, "loss": -0.01 * step} for step in (1, 2, 2)]  # the last step's twice
    plot_curves(tmp_path / "curves.png", history, [(0, 0.0), (2, 0.0)], "", (("accuracy", "a"), ("loss", "l")))
    assert [axis.get_ylim()[0] < 0 for axis in drawn[0].axes] == [False, True]
    assert [list(axis.lines[0].get_xdata()) for axis in drawn[0].axes] == [[0, 2], [1, 2]]
