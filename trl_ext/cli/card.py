"""`latent-reasoning card CHECKPOINT`: complete the model card of a folder with what was measured.

The trainer has written how to open the model, how it was trained, versions and whom to cite. This command adds the accuracy
before and after training and its curves (from `summary.json` and `curves.png` of the run), and evaluations with their
ablations (from `eval.json` and `eval.png`, which `latent-reasoning eval` writes). What you wrote into the card is kept. The
recipes call it at their end.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..common.run_folder import PROGRAM
from ..common.spelling import in_cell
from .command_line import CommandLine
from .console import PlainConsole


METRIC = "accuracy (latent-reasoning eval)"
EVALUATION = "### Evaluation"
NOT_DECODING = ("checkpoint", "tasks", "data", "states", "ablations", "output", "include_path", "batch_size", "engine")


def parser() -> CommandLine:
    """The parser of this command."""
    made = CommandLine(prog=f"{PROGRAM} card", description=__doc__)
    made.add_argument("checkpoint", help="the folder of a saved model, such as runs/hrpo_tiny/final")
    made.add_argument("--run", help="the folder of its run (default: the folder that holds `final`)")
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
    whole = flags.run is not None or folder.resolve().name == "final"
    found, left_out = complete_card(folder, run if whole else None)
    console = PlainConsole()
    for sentence in left_out:
        console.print(sentence, style="yellow")
    console.print(f"{folder / 'README.md'}: {', '.join(found) or 'no results found'}")
    return 0


def complete_card(folder: Path, run: Path | None) -> tuple[list[str], list[str]]:
    """Put results into the card of a saved model, and pictures beside it.

    Args:
        folder: of the saved model.
        run: of the run whose last model it is; None: only evaluations of the folder are put in.

    Returns:
        The names of the files whose results are in the card now, and sentences about what is not.

    Raises:
        ValueError: the folder has no card of this project, or a file is damaged.
    """
    from unsloth_ext.common.model_card import PART, RESULTS, changed_by_hand, read_card, results_in, with_results
    from unsloth_ext.common.settings_file import read_json

    card = folder / "README.md"
    before = read_card(card)
    if before is None or PART.search(before) is None:
        raise ValueError(f"{folder} has no model card of this project: open the model and save it again")
    if changed_by_hand(before):
        return [], [f"{card}: its part about the model was changed by hand, so no results were put in"]
    training, found, left_out = list[str](), list[str](), list[str]()
    if run is not None:
        summary = read_json(str(run), "summary.json", None) or {}
        if "after" in summary:
            training += _shown(run / "summary.json", before_after, summary)
            found += ["summary.json"] if training else []
        if training and (run / "curves.png").is_file():
            if run.resolve() != folder.resolve():
                shutil.copyfile(run / "curves.png", folder / "curves.png")
            training += ["", "![Curves of the training](curves.png)"]
            found.append("curves.png")
    # What stands there is of these weights: the trainer writes the part anew when it saves others
    older_training, heading, older_evaluation = results_in(before).partition(EVALUATION)
    measured = f"{heading}{older_evaluation}"
    file = folder / "eval.json"
    evaluation = read_json(str(folder), file.name, None)
    if evaluation is not None:
        measured = ""
        if why := stale(folder, evaluation):
            left_out.append(f"{file} is left out: {why}")
            evaluation = {}
        elif evaluation.get("results") or evaluation.get("harness"):
            picture = ["", "![Accuracy by what is done to the latent steps](eval.png)"]
            drawn = evaluation.get("results") and (folder / "eval.png").is_file()
            measured = "\n".join([EVALUATION, "", *_shown(file, evaluated, evaluation), *(picture if drawn else ())])
            found.append("eval.json")
    if not found and not left_out:
        return [], []
    both = "\n".join(training) or older_training, measured
    results = "\n\n".join(text.strip() for text in both if text.strip())
    text = with_results(before, f"{RESULTS}\n\n{results}" if results else "")
    card.write_text(text if evaluation is None else with_index(text, folder, evaluation.get("results") or []))
    return found, left_out


def stale(folder: Path, evaluation: dict[str, Any]) -> str | None:
    """Why an evaluation is not of the weights in a folder, or None."""
    of = Path(str(evaluation.get("checkpoint", ""))).parts
    if folder.resolve().parts[-len(of) :] != of and Path(*of).resolve() != folder.resolve():
        return f"it is an evaluation of {Path(*of)}"
    weights = [*folder.glob("*.safetensors")]
    if weights and max(file.stat().st_mtime for file in weights) > (folder / "eval.json").stat().st_mtime:
        return "the weights are newer; evaluate them again"
    return None


def _shown(file: Path, show: Callable[[dict[str, Any]], list[str]], content: dict[str, Any]) -> list[str]:
    try:
        return show(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: not what this project writes there ({type(error).__name__}: {error})") from error


def before_after(summary: dict[str, Any]) -> list[str]:
    """A table of held-out figures before and after training, and of what was measured beside them; empty without any."""
    before, after = summary.get("before") or {}, summary["after"]
    beside = summary.get("results") or {"": (before, after)} if "low" in after else {}
    names = [name for name, value in after.items() if isinstance(value, int | float) and not isinstance(value, bool)]
    names = [name for name in names if name != "n" and not (beside and name in ("accuracy", "low", "high"))]
    if not beside and not names:
        return []
    asked = f" ({after['n']} questions)" if after.get("n") else ""
    lines = [f"Held-out figures before and after training{asked}:", "", "| figure | before | after |", "|---|---|---|"]
    for name, (first, last) in beside.items():
        what = f"accuracy{', ' if name else ''}{in_cell(name)} (95% interval)"
        lines.append(f"| {what} | {_accuracy(first)} | {_accuracy(last)} |")
    return lines + [f"| `{in_cell(name)}` | {_number(before.get(name))} | {_number(after[name])} |" for name in names]


def evaluated(evaluation: dict[str, Any]) -> list[str]:
    """Tables of `latent-reasoning eval`."""
    lines = []
    given = {k: v for k, v in evaluation.get("flags", {}).items() if k not in NOT_DECODING and v not in (None, False)}
    how = ", ".join(f"`{name}` {value}" for name, value in given.items())
    if evaluation.get("results"):
        lines += [
            "`latent-reasoning eval` measured, by what is done to the latent steps (docs/evaluation.md):",
            "",
            f"With {how}.",
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


def with_index(text: str, folder: Path, results: list[dict[str, Any]]) -> str:
    """A card with the metadata by which the hub shows results: those of the model as it was trained. Others' are kept."""
    from huggingface_hub import EvalResult, ModelCard

    card = ModelCard(text, ignore_metadata_errors=True)
    data: Any = card.data  # of `ModelCardData`, whose stub is that of all cards
    others = [one for one in data.eval_results or [] if one.metric_name != METRIC]
    ours = [
        EvalResult(
            task_type="text-generation",
            dataset_type=r["task"],
            dataset_name=r["task"],
            metric_type="accuracy",
            metric_name=METRIC,
            metric_value=r["accuracy"],
        )
        for r in results
        if r["state"] == "on"
    ]
    data.eval_results = [*others, *ours] or None
    if data.eval_results and not getattr(data, "model_name", None):
        name = folder.resolve()
        data.model_name = name.parent.name if name.name == "final" else name.name
    return str(card)


def _accuracy(found: dict[str, Any] | None) -> str:
    return f"{found['accuracy']:.1%} ({found['low']:.1%} to {found['high']:.1%})" if found else ""


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else ""
