"""Report of all stages: a table of held-out metrics, a plot, and sample dialogues."""

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from trl_ext.cli.console import PlainConsole

from ..cli.report import pyplot_for_files
from .chat import Dialogue
from .stage import FolderArguments, load_model, readable


STAGES = ("tokenizer", "pretrain", "sft", "lora", "dpo", "ppo", "grpo", "spo", "distill", "reason")
# User turns for the stages that can answer
DIALOGUES = {
    "sft": ("What is 7+5-3?", "Hello!"),
    "lora": ("Who are you?", "Who built you?"),
    "spo": ("What is 7+5-3?", "How much is 9-4+8-2?"),
    "reason": ("Calculate 6+8+9.",),
}


def report(stage: FolderArguments) -> None:
    """Print the table and the dialogues, and write `report.json` and `report.png` to `run_dir`.

    Raises:
        ValueError: no stage has left a summary there.
    """
    folder, console = Path(stage.run_dir), PlainConsole()
    files = {name: folder / name / "summary.json" for name in STAGES}
    found = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    if not found:
        raise ValueError(f"{folder} has no stage's summary.json; run `make minimind`")
    console.print(table(found))
    plot(folder / "report.png", found)
    said = {name: dialogue(folder / name / "final", DIALOGUES[name]) for name in DIALOGUES if name in found}
    for name, messages in said.items():
        for message in messages:
            console.print(f"[{name}] {message['role']}: {message['content']}")
    stages = {name: {k: v for k, v in s.items() if k != "history"} for name, s in found.items()}
    (folder / "report.json").write_text(json.dumps({"stages": stages, "dialogues": said}, indent=1) + "\n")
    console.print(f"Written: {folder / 'report.json'}, {folder / 'report.png'}")


def table(found: dict[str, dict[str, Any]]) -> Table:
    """A table with one row per metric of each stage."""
    made = Table(title="MiniMind, stage by stage, held out", title_justify="left")
    for heading in ("stage", "metric", "before", "after", "s"):
        made.add_column(heading, justify="left" if heading in ("stage", "metric") else "right")
    for name, summary in found.items():
        for i, metric in enumerate(summary["after"]):
            before, after = (readable(metric, summary[side][metric]) for side in ("before", "after"))
            first = i == 0
            made.add_row(name if first else "", metric, before, after, f"{summary['seconds']:.0f}" if first else "")
    made.add_section()
    made.add_row("", "", "", "all", f"{sum(summary['seconds'] for summary in found.values()):.0f}")
    return made


def plot(path: Path, found: dict[str, dict[str, Any]]) -> None:
    """Plot the training loss of each stage over its steps, or the reward for reinforcement learning."""
    pyplot = pyplot_for_files()
    shown = {name: summary for name, summary in found.items() if summary.get("history")}
    figure, axes = pyplot.subplots(3, 3, figsize=(12, 9), layout="constrained")
    for axis in axes.flat[len(shown) :]:
        axis.axis("off")
    for axis, (name, summary) in zip(axes.flat, shown.items(), strict=False):
        label = "reward" if any("reward" in entry for entry in summary["history"]) else "loss"
        points = [(entry["step"], entry[label]) for entry in summary["history"] if label in entry]
        axis.plot(*zip(*points, strict=True), color="#2b5d9b", marker=None if len(points) > 30 else "o", linewidth=1.5)
        metric = next(iter(summary["after"]))
        change = " -> ".join(readable(metric, summary[side][metric]) for side in ("before", "after"))
        axis.set_title(f"{name}: {label}\nheld-out {metric} {change}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
        axis.locator_params("x", integer=True, min_n_ticks=1)
        axis.set_xlabel("step")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def dialogue(folder: Path, turns: tuple[str, ...]) -> list[dict[str, str]]:
    """The answers of a stage's model to each turn, each in a separate dialogue."""
    model, tokenizer = load_model(str(folder))
    found = []
    for text in turns:
        talk = Dialogue(model, tokenizer, max_new_tokens=64)
        talk.say(text)
        found += talk.messages
    return found
