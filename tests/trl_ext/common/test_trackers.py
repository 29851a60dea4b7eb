"""Experiment trackers of `report_to`: each gets every figure that a trainer logs, under the trainer's groups.

`make test-trackers` runs these in an environment that has the trackers.
"""

import pytest

from tests.trl_ext.concept import setups as concept
from tests.trl_ext.hrpo import setups as hrpo
from tests.trl_ext.latent import setups as latent


pytestmark = pytest.mark.trackers
TRAINERS = {
    "hrpo": (hrpo.hrpo, {}, {"thinking/fraction", "thinking/ratio_deviation", "update/gate"}),
    "latent": (latent.trainer, latent.CASES["kv"], {"latent/norm_ratio", "loss/kv"}),
    "concept": (concept.trainer, {}, {"concept/ratio", "loss/ce"}),
}


@pytest.fixture
def run(tmp_path, monkeypatch, request):
    """Train two steps with a tracker: what the trainer logged, by step. The tracker's files are in `tmp_path`."""
    make, settings, groups = TRAINERS[request.param]
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": str(tmp_path),
        "WANDB_SILENT": "true",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "board"),
    }.items():
        monkeypatch.setenv(name, value)

    def train(tracker):
        names = {"report_to": [tracker], "project": "ours", "run_name": request.param}
        trainer = make(tmp_path / "run", max_steps=2, **names, **settings)
        trainer.train()
        logged: dict[int, dict[str, float]] = {}
        for entry in trainer.state.log_history:
            logged.setdefault(entry["step"], {}).update(entry)
        figures = {step: {k: v for k, v in entry.items() if "/" in k or k == "loss"} for step, entry in logged.items()}
        assert groups <= set().union(*figures.values()) and len(figures) == 2
        return figures

    return train


def check(figures, found):
    """Each figure is found as `train/GROUP/NAME`, with its value (float32 in TensorBoard)."""
    for step, entry in figures.items():
        for name, value in entry.items():
            assert found[step][f"train/{name}"] == pytest.approx(value, rel=1e-6, nan_ok=True), name


@pytest.mark.parametrize("run", TRAINERS, indirect=True)
def test_tensorboard(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    figures = run("tensorboard")
    (file,) = tmp_path.rglob("*tfevents*")
    board = EventAccumulator(str(file.parent))
    board.Reload()
    found: dict[int, dict[str, float]] = {}
    for tag in board.Tags()["scalars"]:
        for event in board.Scalars(tag):
            found.setdefault(event.step, {})[tag] = event.value
    check(figures, found)


@pytest.mark.parametrize("run", TRAINERS, indirect=True)
def test_wandb_offline(run):
    """Its summary holds the last value of each figure."""
    import wandb

    figures = run("wandb")
    check({2: figures[2]}, {2: dict(wandb.run.summary)})
    assert wandb.run.offline
    wandb.finish()


@pytest.mark.parametrize("run", TRAINERS, indirect=True)
def test_trackio(run, request):
    from trackio.sqlite_storage import SQLiteStorage  # it reads TRACKIO_DIR once

    figures = run("trackio")
    name = request.node.callspec.params["run"]
    assert "ours" in SQLiteStorage.get_projects() and name in SQLiteStorage.get_runs("ours")
    steps = [row for row in SQLiteStorage.get_logs("ours", name) if "train/loss" in row]
    check(figures, dict(enumerate(steps, start=1)))
