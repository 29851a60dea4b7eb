"""The picture of all stages."""

from matplotlib.figure import Figure

from trl_ext.minimind.report import plot


def test_each_stage_shows_what_it_trains_on(tmp_path, monkeypatch):
    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    history = [
        {"step": 1, "loss": 3.0, "reward": 0.25},
        {"step": 2, "grad_norm": 1.0},
        {"step": 3, "loss": 2.0, "reward": 0.5},
    ]
    only_loss = [{"step": entry["step"], "loss": entry["loss"]} for entry in history if "loss" in entry]
    sides = {side: {"accuracy": 0.5} for side in ("before", "after")}
    plot(
        tmp_path / "plot.png",
        {
            "sft": {"history": only_loss, **sides},
            "ppo": {"history": history, **sides},
            "report": {},
            "dpo": {"history": only_loss[:1], **sides},
        },
    )
    shown = [axis for axis in figures[0].axes if axis.lines]
    assert [axis.get_title("left").splitlines()[0] for axis in shown] == ["sft: loss", "ppo: reward", "dpo: loss"]
    points = [axis.lines[0].get_xydata().tolist() for axis in shown]
    assert points == [[[1, 3], [3, 2]], [[1, 0.25], [3, 0.5]], [[1, 3]]]
    assert all(tick == int(tick) for axis in shown for tick in axis.get_xticks())
    assert shown[2].lines[0].get_marker() == "o"  # a line through one point is none
    assert (tmp_path / "plot.png").exists() and len(figures[0].axes) == 9
