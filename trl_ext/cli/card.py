"""`latent-reasoning card CHECKPOINT`: complete the model card of a folder with what was measured.

The trainer has written how to open the model, how it was trained, versions and whom to cite. This command adds the accuracy
before and after training and its curves (from `summary.json` and `curves.png` of the run), and evaluations with their
ablations (from `eval.json` and `eval.png`, which `latent-reasoning eval` writes). What you wrote into the card is kept. The
recipes call it at their end.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..common.run_folder import PROGRAM
from .command_line import CommandLine
from .console import PlainConsole


def parser() -> CommandLine:
    """The parser of this command."""
    made = CommandLine(prog=f"{PROGRAM} card", description=__doc__)
    made.add_argument("checkpoint", help="the folder of a saved model, such as runs/hrpo_tiny/final")
    made.add_argument("--run", help="the folder of its run (default: the folder that holds CHECKPOINT)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Complete the card and say where it is. Return 0.

    Raises:
        ValueError: there is no such folder, it has no card of this project, or a file of results is damaged.
    """
    flags = parser().parse_args(argv)
    folder = Path(flags.checkpoint)
    if not folder.is_dir():
        raise ValueError(f"{flags.checkpoint}: there is no such folder; a card belongs to a saved model")
    run = folder.resolve().parent if flags.run is None else Path(flags.run)
    if not run.is_dir():
        raise ValueError(f"--run {flags.run}: there is no such folder")
    found = complete_card(folder, run)
    PlainConsole().print(f"Written: {folder / 'README.md'} ({', '.join(found) or 'no results found yet'})")
    return 0


def complete_card(folder: Path, run: Path) -> list[str]:
    """Put results into the card of a saved model, and pictures beside it.

    Args:
        folder: of the saved model.
        run: of its run.

    Returns:
        The names of the files whose results are in the card now.

    Raises:
        ValueError: the folder has no card of this project, or a file is damaged.
    """
    from huggingface_hub import ModelCard

    from unsloth_ext.common.model_card import PART, RESULTS, with_results

    card = folder / "README.md"
    if not card.is_file() or PART.search(card.read_text()) is None:
        raise ValueError(f"{folder} has no model card of this project: open the model and save it again")
    lines, found = [RESULTS], []
    summary = read_object(run / "summary.json")
    if "after" in summary:
        lines += ["", *before_after(summary), ""]
        found.append("summary.json")
    if (run / "curves.png").is_file():
        if run.resolve() != folder.resolve():
            shutil.copyfile(run / "curves.png", folder / "curves.png")
        lines += ["", "![Curves of the training](curves.png)", ""]
        found.append("curves.png")
    evaluation = read_object(folder / "eval.json")
    if evaluation.get("results") or evaluation.get("harness"):
        lines += ["", *evaluated(evaluation), ""]
        found.append("eval.json")
        if evaluation.get("results") and (folder / "eval.png").is_file():
            lines += ["![Accuracy by what is done to the latent steps](eval.png)", ""]
    if not found:
        return []
    text = with_results(card.read_text(), "\n".join(lines).strip(), card)
    if evaluation.get("results"):
        made = ModelCard(text, ignore_metadata_errors=True)
        made.data["model-index"] = model_index(folder, evaluation["results"])
        text = str(made)
    card.write_text(text)
    return found


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no such file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file}: not a JSON object")
    return found


def before_after(summary: dict[str, Any]) -> list[str]:
    """A table of held-out figures before and after training."""
    before, after = summary.get("before") or {}, summary["after"]
    names = [name for name, value in after.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    lines = ["Held-out figures before and after training:", "", "| figure | before | after |", "|---|---|---|"]
    return lines + [f"| {name} | {_number(before.get(name))} | {_number(after[name])} |" for name in names]


def evaluated(evaluation: dict[str, Any]) -> list[str]:
    """Tables of `latent-reasoning eval`."""
    lines = []
    if evaluation.get("results"):
        lines += [
            "`latent-reasoning eval` measured, by what is done to the latent steps (docs/evaluation.md):",
            "",
            "| task | latent steps | n | accuracy (95% interval) | tokens | forward passes | latent share |",
            "|---|---|---|---|---|---|---|",
        ]
        for r in evaluation["results"]:
            lines.append(
                f"| {r['task']} | {r['state']} | {r['n']} | {r['accuracy']:.1%} ({r['low']:.1%} to {r['high']:.1%}) | "
                f"{r['tokens']:.1f} | {r['forwards']:.1f} | {r['latent_share']:.1%} |"
            )
    if evaluation.get("harness"):
        lines += [
            "",
            "Tasks of lm-evaluation-harness:",
            "",
            "| task | latent steps | metric | n | value | standard error |",
            "|---|---|---|---|---|---|",
        ]
        for r in evaluation["harness"]:
            metric = f"{r['metric']} ({r['filter']})"
            lines.append(
                f"| {r['task']} | {r['state']} | {metric} | {r['n']} | {r['value']:.4f} | {_number(r['stderr'])} |"
            )
    return lines


def model_index(folder: Path, results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The metadata by which the hub shows results: those of the model as it was trained."""
    return [
        {
            "name": folder.resolve().parent.name if folder.name == "final" else folder.resolve().name,
            "results": [
                {
                    "task": {"type": "text-generation"},
                    "dataset": {"type": r["task"], "name": r["task"]},
                    "metrics": [{"type": "accuracy", "value": r["accuracy"]}],
                }
                for r in results
                if r["state"] == "on"
            ],
        }
    ]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""
