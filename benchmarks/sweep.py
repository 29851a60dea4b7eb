"""Which settings a method needs: one setting at a time around the shipped ones, on the embedded default.

    make sweep                                             # every method
    make sweep ARGS="--only codi hrpo --axes learning_rate"
    python -m benchmarks.sweep --only codi --seeds 0 1 2 --workers 1

A trial runs the method's recipe with its configuration and a changed setting, as a user runs it, in a process of its own
on one thread, and reads the held-out accuracy from the recipe's `summary.json`. Optuna queues the trials: the learning
rates of all methods come first, as the first axis of each in `AXES`. MiniMind's stages start from the models in
runs/minimind, which are made there if there are none.

After every trial it writes benchmarks/results/sweep_<device>.json, the table beside it, and the picture of the method in
docs/sweeps/. Finished trials with the same settings are not repeated without `--fresh`; failed ones are.

About 200 trials take 14 hours of one core, those of the learning rates 5. Minutes for a trial on a core of its own: codi
2.5 and hrpo 2 to 3, as measured; pccot and kava 8, lotus 4.5, hrpo-reachability 2.5 and MiniMind's stages 1 to 2.5, from
other benchmarks on one or two threads; coconut 10, concept 5, planner 3, kv-distill and latent-grpo 2, which is estimated.
"""

import json
import re
import tempfile
import threading
from collections.abc import Callable
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import torch
import yaml

import trl_ext
from benchmarks import setups
from benchmarks.over_seeds import ROOT, arguments, run_recipe, spread
from trl_ext.cli.console import PlainConsole
from trl_ext.cli.report import pyplot_for_files
from trl_ext.cli.user_errors import in_sentences
from trl_ext.common.fingerprint import digest
from trl_ext.common.method import commands, training_methods


PICTURES = ROOT / "docs" / "sweeps"
STAGES = ROOT / "runs" / "minimind"
WORKS = 0.02  # a value works if its accuracy is at most this far below the best of its axis
# Factors of the shipped value
RATES = (0.25, 0.5, 1, 2, 4)
WEIGHTS = (0, 0.1, 0.3, 1, 3)
COUNTS = (0.5, 1, 1.5, 2)
FEWER = (0.25, 0.5, 0.75, 1)  # for twelve latent tokens, which are as many as the trace has tokens
HALF_TO_TWICE = (0.5, 1, 2)
AXES: dict[str, dict[str, tuple[float, ...]]] = {
    "hrpo": {"learning_rate": RATES, "lr_residual_gate": RATES, "max_steps": HALF_TO_TWICE},
    "codi": {
        "learning_rate": RATES,
        "w_latent_ce": WEIGHTS,
        "w_codi": WEIGHTS,
        "num_latents": COUNTS,
        "max_steps": HALF_TO_TWICE,
    },
    "pccot": {
        "learning_rate": RATES,
        "w_latent_ce": WEIGHTS,
        "w_codi": WEIGHTS,
        "num_latents": FEWER,
        "max_steps": HALF_TO_TWICE,
    },
    "kava": {
        "learning_rate": RATES,
        "w_kv": WEIGHTS,
        "w_latent_ce": WEIGHTS,
        "num_latents": FEWER,
        "max_steps": HALF_TO_TWICE,
    },
    "lotus": {"learning_rate": RATES, "w_latent_ce": WEIGHTS, "latents_per_step": COUNTS, "max_steps": HALF_TO_TWICE},
    "coconut": {"learning_rate": RATES, "latents_per_step": HALF_TO_TWICE, "max_steps": HALF_TO_TWICE},
    "latent-grpo": {"learning_rate": RATES, "max_steps": HALF_TO_TWICE},
    "hrpo-reachability": {"learning_rate": RATES, "lr_residual_gate": RATES, "max_steps": HALF_TO_TWICE},
    "kv-distill": {"learning_rate": RATES, "lambda_kv": WEIGHTS, "max_steps": HALF_TO_TWICE},
    "concept": {
        "learning_rate": RATES,
        "ratio_weight": WEIGHTS,
        "usage_weight": WEIGHTS,
        "target_ratio": HALF_TO_TWICE,
        "max_steps": HALF_TO_TWICE,
    },
    "planner": {"learning_rate": RATES, "usage_weight": WEIGHTS, "quota_weight": WEIGHTS, "max_steps": HALF_TO_TWICE},
    "spo": {"learning_rate": RATES, "max_steps": HALF_TO_TWICE},
    "ppo": {"learning_rate": RATES, "critic_learning_rate": RATES, "vf_coef": WEIGHTS, "max_steps": HALF_TO_TWICE},
    "distill": {"learning_rate": RATES, "alpha": (0, 0.5, 1, 1.5, 2), "max_steps": HALF_TO_TWICE},
    "reason": {"learning_rate": RATES, "tag_weight": (0.1, 0.3, 1, 3), "max_steps": HALF_TO_TWICE},
    "minimind-sft": {"learning_rate": RATES, "max_steps": HALF_TO_TWICE},
    "minimind-grpo": {"learning_rate": RATES, "max_steps": HALF_TO_TWICE},
}
# Settings of a configuration that change by the same factor as an axis: a block for each step, and a stage for each block
TOGETHER = {"latents_per_step": "num_latents", "max_steps": "stage_epochs"}
# Recipe, configuration and trainer of what is not `make train-NAME` with its first configuration
OTHERS = {
    "hrpo-reachability": ("recipes/hrpo_gsm8k.py", "recipes/configs/hrpo_reachability.yaml", "HRPOTrainer"),
    "minimind-sft": ("recipes/minimind/sft.py", "recipes/minimind/configs/sft_tiny.yaml", ""),
    "minimind-grpo": ("recipes/minimind/grpo.py", "recipes/minimind/configs/grpo_tiny.yaml", ""),
}
# Training commands without axes, and why
LEFT_OUT = {
    "hrpo-two-stage": "two runs of hrpo, whose settings are swept there",
    "concept-v1": "baselines of concept, with the settings of its configuration",
    "minimind": "every stage in turn; those with a trainer of ours, SFT and GRPO are swept one by one",
}


def recipe(name: str) -> tuple[str, str, str]:
    """The script and the configuration of a method's embedded default, as paths from the root, and its trainer's name,
    which is empty for TRL's trainers."""
    if name in OTHERS:
        return OTHERS[name]
    command = commands()[f"train-{name}"]
    (script,) = command.scripts
    config = Path(script).parent / "configs" / f"{command.configs or Path(script).stem}_tiny.yaml"
    return script, str(config), command.trainer


def configuration(file: str) -> dict[str, Any]:
    """The settings in a configuration file."""
    return yaml.safe_load((ROOT / file).read_text())


def shipped(name: str) -> dict[str, Any]:
    """Every setting of a method's embedded default: its configuration, over the preset that it names, over the defaults
    of its trainer."""
    _, file, trainer = recipe(name)
    found = configuration(file)
    classes = {one: config for method in training_methods().values() for one, config in method.trainers.items()}
    if not trainer:
        return found
    config = getattr(trl_ext, classes[trainer])
    preset = config.preset_fields(found["preset"]) if "preset" in found else {}
    return {f.name: f.default for f in fields(config) if f.default is not MISSING} | preset | found


def changes(name: str, axis: str, factor: float) -> dict[str, float]:
    """The changed settings at a factor of an axis, the axis first; none for the shipped value."""
    found, also = shipped(name), TOGETHER.get(axis)
    if factor == 1:
        return {}
    keys = [axis, also] if also in configuration(recipe(name)[1]) else [axis]
    return {key: scaled(found[key], factor) for key in keys}


def scaled(value: float, factor: float) -> float:
    """The value times the factor: a whole number stays one, others are rounded to six digits."""
    return round(value * factor) if isinstance(value, int) else float(f"{value * factor:.6g}")


def earlier_stages(config: dict[str, Any]) -> list[str]:
    """MiniMind's stages whose models a run with this configuration starts from, the first stage first."""
    named = re.findall(r"runs/minimind/(\w+)/final", json.dumps(config))
    return [one for stage in named for one in (*earlier_stages(configuration(stage_file(stage))), stage)]


def stage_file(stage: str) -> str:
    return f"recipes/minimind/configs/{stage}_tiny.yaml"


def made_with(name: str, changed: dict[str, float], seed: int) -> str:
    """A digest of all settings that a trial depends on, those of MiniMind's earlier stages included."""
    found = shipped(name)
    return digest([found, [configuration(stage_file(stage)) for stage in earlier_stages(found)], changed, seed])


def prepare(names: list[str]) -> None:
    """Make the models of MiniMind's earlier stages, which two runs at a time would otherwise both begin to make."""
    for name in names:
        for stage in earlier_stages(configuration(recipe(name)[1])):
            if not (STAGES / stage / "final").exists():
                run_recipe(f"the {stage} stage before {name}", f"recipes/minimind/{stage}.py", [], OMP_NUM_THREADS="1")


def run(name: str, changed: dict[str, float], seed: int) -> dict[str, float]:
    """Run a trial.

    Args:
        name: the method.
        changed: settings in place of the shipped ones.
        seed: of the trainer.

    Returns:
        Held-out accuracy `before` and `after`, `seconds` of the recipe, and `steps`.

    Raises:
        RuntimeError: the recipe failed.
    """
    script, config, _ = recipe(name)
    with tempfile.TemporaryDirectory() as folder:
        flags = {"config": config, "output_dir": folder, "seed": seed, "disable_tqdm": "true", **changed}
        flags |= {"use_cpu": "false"} if setups.CUDA else {}
        given = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
        run_recipe(name, script, given, OMP_NUM_THREADS="1")
        summary = json.loads(Path(folder, "summary.json").read_text())
    return {side: accuracy(summary[side]) for side in ("before", "after")} | {
        key: summary[key] for key in ("seconds", "steps")
    }


def accuracy(numbers: dict[str, float]) -> float:
    """The accuracy among a recipe's held-out numbers. Some of MiniMind's stages have a loss beside it."""
    return next(value for key, value in numbers.items() if key.startswith("accuracy"))


def search(jobs: list[tuple[str, str, float, int]], workers: int, keep: Callable[[str, dict], None]) -> None:
    """Run trials in their order, some at a time.

    Args:
        jobs: method, axis, factor and seed of each trial.
        workers: number of trials at a time.
        keep: called with the method and the record of every trial that has ended. A failed one has the last line of its
            `error`.
    """
    import optuna  # of requirements/dev.txt

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # `keep` tells of every trial
    one_at_a_time = threading.Lock()

    def objective(trial: optuna.Trial) -> float:
        name = trial.suggest_categorical("method", list(AXES))
        axis = trial.suggest_categorical(f"axis of {name}", list(AXES[name]))
        factor = trial.suggest_categorical(f"{name}: factor of {axis}", AXES[name][axis])
        seed, changed = trial.suggest_int("seed", 0, 2**32 - 1), changes(name, axis, factor)
        record = {"changed": changed, "seed": seed, "made_with": made_with(name, changed, seed)}
        try:
            record |= run(name, changed, seed)
        except RuntimeError as error:
            record["error"] = str(error).strip().splitlines()[-1]
            raise
        finally:
            trial.set_user_attr("record", record)
        return record["after"]

    def ended(_: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        with one_at_a_time:
            keep(trial.params["method"], trial.user_attrs["record"])

    study = optuna.create_study(direction="maximize")
    for name, axis, factor, seed in jobs:
        which = {"method": name, f"axis of {name}": axis, f"{name}: factor of {axis}": factor, "seed": seed}
        study.enqueue_trial(which)
    study.optimize(objective, n_trials=len(jobs), n_jobs=workers, catch=(RuntimeError,), callbacks=[ended])


def still_valid(name: str, trials: list[dict]) -> list[dict]:
    """The finished trials that would have the same settings today."""
    return [t for t in trials if "error" not in t and t["made_with"] == made_with(name, t["changed"], t["seed"])]


def missing(names: list[str], axes: list[str], seeds: list[int], results: dict[str, dict]) -> list[tuple]:
    """The trials that have no result: the first axis of every method, then the second of every method, and so on. The
    shipped values, which are on every axis of a method, are one trial."""
    done = {(n, json.dumps(t["changed"]), t["seed"]) for n in results for t in results[n]["trials"]}
    jobs = []
    for place in range(max(len(AXES[name]) for name in names)):
        for name in names:
            for axis in [a for a in list(AXES[name])[place : place + 1] if a in axes]:
                for factor in sorted(AXES[name][axis], key=lambda factor: factor != 1):
                    for seed in seeds:
                        which = name, json.dumps(changes(name, axis, factor)), seed
                        if which not in done:
                            done.add(which)
                            jobs.append((name, axis, factor, seed))
    return jobs


def by_value(found: dict[str, Any], axis: str) -> dict[float, list[dict]]:
    """The trials of an axis by its value, in order, those with the shipped value included.

    Args:
        found: the shipped values and the trials of a method.
        axis: one of its settings.
    """
    values: dict[float, list[dict]] = {}
    for trial in found["trials"]:
        if next(iter(trial["changed"]), axis) == axis:
            values.setdefault(trial["changed"].get(axis, found["shipped"][axis]), []).append(trial)
    return {value: sorted(values[value], key=lambda trial: trial["seed"]) for value in sorted(values)}


def mean(trials: list[dict]) -> float:
    """Mean accuracy of trials after training; minus infinity if one of them failed."""
    return sum(t["after"] for t in trials) / len(trials) if not any("error" in t for t in trials) else float("-inf")


def working(values: dict[float, list[dict]], shipped_value: float) -> list[float]:
    """The values around the shipped one, without a gap, at most `WORKS` below the best; empty if it is not among them."""
    means = {value: mean(trials) for value, trials in values.items()}
    works = [value for value in means if means[value] >= max(0.0, max(means.values()) - WORKS - 1e-9)]
    tried = list(means)
    if shipped_value not in works:
        return []
    first = last = tried.index(shipped_value)
    while first > 0 and tried[first - 1] in works:
        first -= 1
    while last + 1 < len(tried) and tried[last + 1] in works:
        last += 1
    return tried[first : last + 1]


def swept(found: dict[str, Any]) -> list[str]:
    """The axes of a method on which there is more than the shipped value."""
    return [axis for axis in found["shipped"] if len(by_value(found, axis)) > 1]


def table(results: dict[str, dict]) -> str:
    """A Markdown table with a row for each axis."""
    lines = ["| method | setting | shipped | accuracy at each value | works |", "|---|---|---:|---|---|"]
    for name, found in results.items():
        for axis in swept(found):
            values, is_shipped = by_value(found, axis), found["shipped"][axis]
            tried = "; ".join(f"{value:g}: {told(trials)}" for value, trials in values.items())
            works = working(values, is_shipped)
            if is_shipped not in values:
                span = "the shipped value was not tried"
            elif not works:
                span = "**the shipped value is not in it**"
            else:
                span = " to ".join(f"{value:g}" for value in dict.fromkeys((works[0], works[-1])))
            lines.append(f"| {name} | `{axis}` | {is_shipped:g} | {tried} | {span} |")
    return "\n".join(lines)


def told(trials: list[dict]) -> str:
    """The accuracy of trials that differ in their seed, or why one of them failed."""
    errors = [trial["error"] for trial in trials if "error" in trial]
    return f"failed ({errors[0].replace('|', ' ')})" if errors else spread([t["after"] for t in trials], ".1%")


def in_order(results: dict[str, dict]) -> dict[str, dict]:
    """The methods with an axis of several values, in the order of `AXES`."""
    return {name: results[name] for name in AXES if name in results and swept(results[name])}


def page(found: dict) -> str:
    """The table of benchmarks/results/sweep_<device>.md."""
    results = in_order(found["results"])
    seeds = sorted({trial["seed"] for each in results.values() for trial in each["trials"]})
    pictures = "\n\n".join(f"![{name}: accuracy by setting](../../docs/sweeps/{name}.png)" for name in results)
    return f"""# Sweeps of settings

One setting at a time is changed in the embedded default of a method. Accuracy is that of its recipe on held-out rows after
training (seeds: {", ".join(map(str, seeds))}). "Works" is the range around the shipped value, without a gap, whose values
are at most {WORKS * 100:g} points below the best of their row; one that ends where the row does may go on. With one seed,
differences of a few points can be chance.

{table(results)}

{pictures}"""


def draw(name: str, found: dict[str, Any]) -> None:
    """Draw docs/sweeps/<name>.png: a panel for each axis.

    Values stand at equal distances, as they are factors of the shipped one, and 0 has no place on a logarithmic axis.
    """
    pyplot = pyplot_for_files()
    axes = swept(found)
    figure, panels = pyplot.subplots(
        1, len(axes), figsize=(1 + 3 * len(axes), 3.2), layout="constrained", sharey=True, squeeze=False
    )
    before = [trial["before"] for trial in found["trials"] if "before" in trial]
    for panel, axis in zip(panels.flat, axes, strict=True):
        values, is_shipped = by_value(found, axis), found["shipped"][axis]
        places = {value: place for place, value in enumerate(values)}
        means = {value: mean(trials) for value, trials in values.items()}
        failed = [places[value] for value in values if means[value] < 0]
        if before:
            panel.axhline(sum(before) / len(before), color="grey", linewidth=1, linestyle=":", label="before training")
        if len(failed) < len(values):
            panel.axhspan(max(means.values()) - WORKS, max(means.values()), color="#2b5d9b", alpha=0.15, linewidth=0)
        if is_shipped in places:
            panel.axvline(places[is_shipped], color="#d1822c", linewidth=1.2, linestyle="--", label="shipped")
        heights = [each if each >= 0 else float("nan") for each in means.values()]  # a gap in the line
        panel.plot(list(places.values()), heights, color="#2b5d9b")
        points = [(places[value], trial["after"]) for value in values for trial in values[value] if "after" in trial]
        panel.plot([place for place, _ in points], [height for _, height in points], "o", color="#2b5d9b")
        if failed:
            panel.plot(failed, [0.0] * len(failed), "x", color="#b03030", label="failed")
        if failed or panel is panels[0, 0]:
            panel.legend(frameon=False, fontsize=8)
        panel.set_xticks(list(places.values()), [f"{value:g}" for value in places], fontsize=8)
        panel.set_title(axis, loc="left", fontsize=10)
        panel.set_ylim(-0.03, 1.03)
        panel.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.3)
    figure.suptitle(f"{name}: held-out accuracy")
    PICTURES.mkdir(exist_ok=True)
    figure.savefig(PICTURES / f"{name}.png", dpi=110)
    pyplot.close(figure)


def show(path: Path, names: list[str]) -> None:
    """Write the page of a file of results, and the pictures of these methods."""
    setups.write_table(path, page)
    results = in_order(json.loads(path.read_text())["results"])
    for name in (name for name in names if name in results):
        draw(name, results[name])


def main() -> None:
    torch.set_num_threads(1)  # as its trials have; the results name the number
    parser = arguments(__doc__, list(AXES), None, [0])
    every = sorted({axis for axes in AXES.values() for axis in axes})
    parser.add_argument("--axes", nargs="*", default=every, choices=every)
    parser.add_argument("--workers", type=int, default=1 if setups.CUDA else 2, help="number of trials at a time")
    options = parser.parse_args()
    path, before = setups.so_far("sweep", options.fresh, {})
    results = {}
    for name in options.only:
        trials = still_valid(name, before.get(name, {"trials": []})["trials"])
        results[name] = {"shipped": {axis: shipped(name)[axis] for axis in AXES[name]}, "trials": trials}
    jobs = missing(options.only, options.axes, options.seeds, results)
    prepare([name for name in options.only if any(job[0] == name for job in jobs)])

    def keep(name: str, record: dict) -> None:
        results[name]["trials"].append(record)
        others = setups.so_far("sweep", False, {})[1]  # another process may work on them
        setups.write("sweep", {"command": "make sweep", "results": others | {name: results[name]}})
        show(path, [name])
        what = ", ".join(f"{key}={value:g}" for key, value in record["changed"].items()) or "as shipped"
        said = record.get("error") or f"{record['before']:.1%} -> {record['after']:.1%} in {record['seconds']:.0f} s"
        print(f"{name}, {what}, seed {record['seed']}: {said}", flush=True)

    search(jobs, options.workers, keep)
    if not path.exists():
        raise ValueError(f"--axes {' '.join(options.axes)}: none of {', '.join(options.only)} has such an axis")
    show(path, options.only)
    PlainConsole().print(table(in_order(results)))
    print(path)


TABLES = {"sweep": page}


if __name__ == "__main__":
    in_sentences()
    main()
