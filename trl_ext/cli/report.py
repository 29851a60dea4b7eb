"""The report of a run: a table in the terminal, `summary.json`, and a picture of its curves."""

import json
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

from rich.table import Table
from transformers import ProgressCallback, Trainer

from trl_ext.cli.console import PlainConsole

from ..common.method import training_methods


class CompactProgress(ProgressCallback):
    """transformers' progress bar with a few metrics beside it, instead of the whole dictionary at each log.

    Without a terminal it prints lines.
    """

    SHOWN = {"reward": "reward", "completions/mean_length": "length", "loss": "loss"} | {
        metric: short for method in training_methods().values() for metric, short in method.progress.items()
    }

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            shown = {
                short: f"{round(logs[name], 3) + 0.0:.3f}"
                for name, short in self.SHOWN.items()
                if logs.get(name) is not None
            }
            if shown and self.training_bar.disable:  # in a file, a bar would be one endless line
                figures = "  ".join(f"{name} {value}" for name, value in shown.items())
                print(f"step {state.global_step} of {state.max_steps}  {figures}", flush=True)
            elif shown:
                self.training_bar.set_postfix(shown)


def compact_progress(trainer: Trainer) -> None:
    """Replace the trainer's progress callback by `CompactProgress`."""
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(CompactProgress)


def before_after_table(before: Any, after: Any, console: PlainConsole) -> None:
    """Print two `Evaluation`s side by side."""
    table = Table(title=f"Held-out problems: {after.n}", title_justify="left")
    for heading in ("", "before", "after"):
        table.add_column(heading, justify="right" if heading else "left")
    interval = lambda e: f"{e.accuracy:.1%} ({e.low:.1%} to {e.high:.1%})"  # noqa: E731
    table.add_row("accuracy (95% interval)", interval(before), interval(after))
    table.add_row("format rate", f"{before.format_rate:.1%}", f"{after.format_rate:.1%}")
    table.add_row("mean length, tokens", f"{before.mean_length:.1f}", f"{after.mean_length:.1f}")
    if before.thinking_share or after.thinking_share:
        table.add_row("thinking share", f"{before.thinking_share:.1%}", f"{after.thinking_share:.1%}")
    console.print(table)


def ablations_table(after: Any, ablated: dict[str, Any], console: PlainConsole) -> None:
    """Print the accuracy of `Evaluation`s after training: with thinking states as trained, and with replaced ones."""
    table = Table(title="After training, with thinking states", title_justify="left")
    for heading in ("", "accuracy (95% interval)"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, e in {"as trained": after, **ablated}.items():
        table.add_row(name, f"{e.accuracy:.1%} ({e.low:.1%} to {e.high:.1%})")
    console.print(table)


def comparison_table(rows: dict[str, tuple[Any, Any]], console: PlainConsole) -> None:
    """Print `LatentEvaluation`s before and after training, by name. The first may be None."""
    n = next(after.n for _, after in rows.values())
    table = Table(title=f"Held-out questions: {n}", title_justify="left")
    for heading in ("", "before", "after", "95% interval", "passes", "ms"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name, (before, after) in rows.items():
        table.add_row(
            name,
            f"{before.accuracy:.1%}" if before else "",
            f"{after.accuracy:.1%}",
            f"{after.low:.1%} to {after.high:.1%}",
            f"{after.forward_passes:.1f}",
            f"{after.seconds * 1000:.2f}",
        )
    console.print(table)
    console.print("Forward passes and milliseconds are per question, after training, answered in batches.")


def write_summary(folder: Path, **values: Any) -> None:
    """Write `summary.json` atomically."""
    target = folder / "summary.json"
    part = target.with_suffix(".part")
    part.write_text(json.dumps(values, indent=2) + "\n")
    part.replace(target)


def pyplot_for_files() -> ModuleType:
    """matplotlib's pyplot for drawing to files.

    A `$` in a title is a plain dollar sign, because names and paths may contain one. Characters that the font lacks are
    drawn as boxes without a warning.
    """
    import matplotlib

    warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)
    matplotlib.use("Agg")
    matplotlib.rcParams["text.parse_math"] = False
    from matplotlib import pyplot

    return pyplot


def plot_curves(path: Path, history: list[dict], accuracy: list[tuple[int, float]], title: str, curves: tuple) -> None:
    """Plot curves over training steps in a grid; metrics that were not logged are left out.

    matplotlib draws it, because a run must end with a picture without any account or server. Experiment trackers remain
    available through `report_to`.

    Args:
        path: file of the picture.
        history: the trainer's `log_history`.
        accuracy: pairs of step and accuracy.
        title: title of the picture.
        curves: metrics to plot, with titles.
    """
    pyplot = pyplot_for_files()
    # Keep one value per step, because the end of a run is logged at the last step too
    series = {name: list({e["step"]: e[name] for e in history if name in e}.items()) for name, _ in curves}
    series["accuracy"] = list(dict(accuracy).items())
    shown = [(name, label) for name, label in curves if len(series[name]) > 1]
    columns = 2 if len(shown) == 4 else max(1, min(3, len(shown)))
    rows = max(1, -(-len(shown) // columns))
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(1 + 4 * columns, 3.25 * rows), layout="constrained", sharex=True, squeeze=False
    )
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, (name, label) in zip(axes.flat, shown, strict=False):
        steps, values = zip(*series[name], strict=True)
        many = len(steps) > 30
        axis.plot(steps, values, color="#9db8d9" if many else "#2b5d9b", marker=None if many else "o", linewidth=1.2)
        if many:
            axis.plot(steps, _smooth(values), color="#2b5d9b", linewidth=2, label="running mean")
            axis.legend(frameon=False)
        axis.set_title(label, loc="left", fontsize=10)
        if min(values) >= 0 > axis.get_ylim()[0]:  # none of these metrics is negative
            axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        axis.locator_params("x", integer=True, min_n_ticks=1)
    for axis in axes.flat[max(0, len(shown) - columns) : len(shown)]:  # the lowest axis of each column
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _smooth(values: tuple[float, ...], window: int = 10) -> list[float]:
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
