"""The sweep runs what is shipped, one setting at a time, resumes, and its page says what its figures say."""

import json
import sys
from types import SimpleNamespace

import pytest

from benchmarks import setups, sweep
from trl_ext.cli.report import pyplot_for_files
from trl_ext.common.method import commands


def trial(after, seed=0, **changed):
    figures = (
        {"error": after} if isinstance(after, str) else {"before": 0.2, "after": after, "seconds": 9.0, "steps": 5}
    )
    return {"changed": changed, "seed": seed, "made_with": "x", **figures}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """`fake(words)` runs the command line without recipes; the trials that were run are in `fake.ran`."""
    ran = []

    def run(name, changed, seed):
        ran.append((name, changed, seed))
        if changed.get("learning_rate", 0) > 0.003:
            raise RuntimeError("codi: Traceback\n  some line\nValueError: the loss is not a number\n")
        return {"before": 0.2, "after": 0.9, "seconds": 1.0, "steps": 1}

    monkeypatch.setattr(setups, "RESULTS", tmp_path)
    monkeypatch.setattr(sweep, "PICTURES", tmp_path / "pictures")
    monkeypatch.setattr(sweep, "run", run)

    def main(words):
        monkeypatch.setattr(sys, "argv", ["sweep.py", *words.split()])
        sweep.main()
        return json.loads((tmp_path / f"sweep_{setups.device_name()}.json").read_text())["results"]

    main.ran = ran
    return main


def test_every_training_command_has_axes_or_a_reason_for_none():
    trained = {command.trains for command in commands().values() if command.trains}
    assert trained == (set(sweep.AXES) - set(sweep.OTHERS)) | set(sweep.LEFT_OUT)
    assert set(sweep.OTHERS) < set(sweep.AXES) and all(" " in reason for reason in sweep.LEFT_OUT.values())


@pytest.mark.parametrize("name", sweep.AXES)
def test_axes_are_settings_of_the_recipe_with_other_values_than_the_shipped_one(name):
    assert next(iter(sweep.AXES[name])) == "learning_rate"
    script, config, _ = sweep.recipe(name)
    assert (sweep.ROOT / script).exists() and (sweep.ROOT / config).exists()
    for axis, factors in sweep.AXES[name].items():
        values = [sweep.changes(name, axis, factor).get(axis, sweep.shipped(name)[axis]) for factor in factors]
        assert 1 in factors and values == sorted(set(values)) and len(values) > 2, (axis, values)


@pytest.mark.parametrize(
    "name, axis, value",
    [
        ("codi", "learning_rate", 2e-3),  # from the configuration
        ("kv-distill", "lambda_kv", 1.0),  # the trainer's default
        ("concept", "usage_weight", 0.1),  # from the preset that the configuration names
        ("hrpo-reachability", "lr_residual_gate", 1e-2),  # from the other task's configuration
        ("minimind-grpo", "learning_rate", 3e-4),
    ],
)
def test_the_shipped_value(name, axis, value):
    assert sweep.shipped(name)[axis] == value


@pytest.mark.parametrize(
    "name, axis, factor, wanted",
    [
        ("codi", "learning_rate", 0.25, {"learning_rate": 5e-4}),
        ("codi", "learning_rate", 1, {}),
        ("codi", "w_codi", 0, {"w_codi": 0.0}),
        ("codi", "max_steps", 2, {"max_steps": 2000}),
        ("lotus", "max_steps", 0.5, {"max_steps": 500, "stage_epochs": 0.24}),
        ("lotus", "latents_per_step", 1.5, {"latents_per_step": 9, "num_latents": 27}),
    ],
)
def test_a_factor_changes_a_setting_and_what_belongs_to_it(name, axis, factor, wanted):
    found = sweep.changes(name, axis, factor)
    assert found == wanted and [*map(type, found.values())] == [*map(type, wanted.values())]


def test_a_trial_runs_the_recipe_with_its_configuration_and_the_changed_settings(tmp_path, monkeypatch):
    script = tmp_path / "recipe.py"
    script.write_text(
        """import json, os, sys
given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if given["--w_codi"] == "0.3":
    raise ValueError("no such weight")
given["threads"] = os.environ["OMP_NUM_THREADS"]
sides = {"before": {"loss": 1.0, "accuracy on sums": 0.25}, "after": {"loss": 0.5, "accuracy on sums": 0.75}}
json.dump({**sides, "seconds": 3.5, "steps": given}, open(given["--output_dir"] + "/summary.json", "w"))
"""
    )
    monkeypatch.setattr(sweep, "recipe", lambda name: (str(script), "some.yaml", ""))
    found = sweep.run("codi", {"w_codi": 0.1, "num_latents": 3}, 4)
    given = found.pop("steps")
    assert found == {"before": 0.25, "after": 0.75, "seconds": 3.5}
    assert given.items() >= {"--config": "some.yaml", "--seed": "4", "--w_codi": "0.1", "--num_latents": "3"}.items()
    assert given["threads"] == "1"
    with pytest.raises(RuntimeError, match="no such weight"):
        sweep.run("codi", {"w_codi": 0.3}, 4)


def test_first_axes_come_first_and_the_shipped_values_are_one_trial():
    jobs = sweep.missing(["codi", "hrpo"], ["learning_rate", "max_steps", "num_latents"], [0, 1], {})
    names = [(name, axis) for name, axis, _, _ in jobs]
    assert list(dict.fromkeys(names)) == [
        ("codi", "learning_rate"),
        ("hrpo", "learning_rate"),
        ("hrpo", "max_steps"),  # the third of hrpo, the fifth of codi
        ("codi", "num_latents"),
        ("codi", "max_steps"),
    ]
    assert jobs[:2] == [("codi", "learning_rate", 1, 0), ("codi", "learning_rate", 1, 1)]
    assert [job for job in jobs if job[0] == "codi" and job[2] == 1] == jobs[:2]
    assert len(jobs) == len(set(jobs)) == 2 * (5 + 3 + 2 + 5 + 2)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_failed_trial_is_recorded_and_the_others_are_run(fake, workers, capsys):
    found = fake(f"--only codi --axes learning_rate --workers {workers}")["codi"]["trials"]
    assert len(fake.ran) == len(found) == 5
    said = {t["changed"].get("learning_rate"): t.get("error", t.get("after")) for t in found}
    failed = "ValueError: the loss is not a number"
    assert said == {None: 0.9, 5e-4: 0.9, 1e-3: 0.9, 4e-3: failed, 8e-3: failed}
    assert "codi, learning_rate=0.004, seed 0: ValueError" in capsys.readouterr().out
    page = (setups.RESULTS / f"sweep_{setups.device_name()}.md").read_text()
    assert f"0.002: 90.0%; 0.004: failed ({failed}); 0.008: failed" in page and "| 0.0005 to 0.002 |" in page
    assert (sweep.PICTURES / "codi.png").stat().st_size > 5000


def test_finished_trials_are_not_repeated_and_failed_ones_are(fake):
    before = fake("--only codi --axes learning_rate")
    fake.ran.clear()
    after = fake("--only codi hrpo --axes learning_rate")
    assert {rate for name, changed, _ in fake.ran if name == "codi" for rate in changed.values()} == {4e-3, 8e-3}
    assert len(fake.ran) == 2 + 5
    assert len(after["codi"]["trials"]) == 5 and len(after["hrpo"]["trials"]) == 5
    assert [t for t in after["codi"]["trials"] if "error" not in t] == [
        t for t in before["codi"]["trials"] if "error" not in t
    ]
    fake.ran.clear()
    fake("--only codi --axes learning_rate --seeds 0 1")
    assert {seed for name, changed, seed in fake.ran if changed.get("learning_rate", 0) < 3e-3} == {1}


def test_an_axis_that_no_chosen_method_has_is_named(fake):
    with pytest.raises(ValueError, match="--axes w_kv: none of hrpo, codi has such an axis"):
        fake("--only hrpo codi --axes w_kv")


def test_trials_of_other_settings_are_run_again_and_other_methods_stay(fake, monkeypatch):
    first = fake("--only codi hrpo --axes learning_rate max_steps")
    fake.ran.clear()
    stock = sweep.shipped
    more = {"warmup_steps": 7}
    monkeypatch.setattr(sweep, "shipped", lambda name: stock(name) | (more if name == "codi" else {}))
    found = fake("--only codi --axes learning_rate")
    assert len(fake.ran) == 5 and len(found["codi"]["trials"]) == 5  # the budgets of before are gone too
    assert found["hrpo"] == first["hrpo"]


def test_minimind_stages_depend_on_the_stages_before(tmp_path, monkeypatch):
    before = {name: sweep.made_with(name, {}, 0) for name in ("ppo", "codi")}
    ran = []
    monkeypatch.setattr(sweep, "STAGES", tmp_path)
    monkeypatch.setattr(sweep, "run_recipe", lambda what, script, flags, **_: ran.append(script))
    (tmp_path / "tokenizer" / "final").mkdir(parents=True)
    sweep.prepare(["codi", "ppo"])
    assert ran == ["recipes/minimind/pretrain.py", "recipes/minimind/sft.py"]

    stock, changed = sweep.configuration, {"recipes/minimind/configs/pretrain_tiny.yaml": {"max_steps": 7}}
    monkeypatch.setattr(sweep, "configuration", lambda file: stock(file) | changed.get(file, {}))
    assert sweep.made_with("ppo", {}, 0) != before["ppo"] and sweep.made_with("codi", {}, 0) == before["codi"]


@pytest.mark.parametrize(
    "accuracies, is_shipped, wanted",
    [
        ({1: 0.5, 2: 0.9, 3: 0.88, 4: 0.87}, 2, [2, 3]),  # two points below the best still work
        ({1: 0.9, 2: 0.5, 3: 0.9, 4: 0.9}, 4, [3, 4]),  # not beyond a gap
        ({1: 0.9, 2: 0.87, 3: 0.5}, 2, []),  # the shipped value is not among them
        ({1: 0.9, 2: "failed", 3: 0.9}, 3, [3]),
        ({1: 0.9, 2: "failed"}, 2, []),
        ({1: 0.9, 3: 0.9}, 2, []),  # it was not tried
        ({1: "failed", 2: "failed"}, 2, []),
    ],
)
def test_the_range_that_works_is_around_the_shipped_value(accuracies, is_shipped, wanted):
    values = {value: [trial(after)] for value, after in accuracies.items()}
    assert sweep.working(values, is_shipped) == wanted


TWO = {
    "shipped": {"learning_rate": 0.002, "w_codi": 1.0, "num_latents": 6},
    "trials": [
        trial(0.9),
        trial(0.4, learning_rate=0.004),
        trial(0.895, learning_rate=0.001),
        trial("ValueError: a | b", w_codi=0.0),
        trial(1.0, w_codi=3.0),
        trial(0.8, seed=1),
    ],
}


def test_the_page_has_a_row_for_each_axis_with_its_range():
    rows = [line for line in sweep.page({"results": {"codi": TWO}}).splitlines() if line.startswith("| codi")]
    assert rows == [
        "| codi | `learning_rate` | 0.002 | 0.001: 89.5%; 0.002: 85.0% (80.0%..90.0%); 0.004: 40.0% | "
        "**the shipped value is not in it** |",
        "| codi | `w_codi` | 1 | 0: failed (ValueError: a   b); 1: 85.0% (80.0%..90.0%); 3: 100.0% | "
        "**the shipped value is not in it** |",
    ]
    assert "(seeds: 0, 1)" in sweep.page({"results": {"codi": TWO}})


def test_the_picture_has_a_panel_for_each_axis(tmp_path, monkeypatch):
    pyplot, drawn = pyplot_for_files(), []
    monkeypatch.setattr(sweep, "PICTURES", tmp_path)
    monkeypatch.setattr(
        sweep, "pyplot_for_files", lambda: SimpleNamespace(subplots=pyplot.subplots, close=drawn.append)
    )
    sweep.draw("codi", TWO)
    figure = drawn[0]
    rate, weight = figure.axes
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["learning_rate", "w_codi"]
    assert [label.get_text() for label in weight.get_xticklabels()] == ["0", "1", "3"]
    lines = {line.get_label(): line for line in weight.get_lines()}
    assert [*lines["shipped"].get_xdata()] == [1, 1] and [*lines["failed"].get_xdata()] == [0]
    means = next(line for line in rate.get_lines() if [*line.get_xdata()] == [0, 1, 2])
    assert [*means.get_ydata()] == pytest.approx([0.895, 0.85, 0.4], abs=1e-12)
    assert (tmp_path / "codi.png").exists()
    sweep.draw("codi", {**TWO, "trials": [trial("ValueError: a"), trial("ValueError: b", w_codi=0.0)]})
    pyplot.close("all")
