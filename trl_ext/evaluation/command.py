"""`latent-reasoning eval CHECKPOINT --tasks gsm8k --data gsm8k=test.jsonl`: accuracy, costs and ablations of a model.

lm-evaluation-harness runs the tasks. The table has a row for each task and each state of the latent steps. `eval.json`,
`eval.png` and the texts (`samples_TASK_STATE.jsonl`) are written beside the checkpoint, or into --output.
"""

import argparse
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from ..cli.command_line import CommandLine
from ..cli.console import PlainConsole
from ..cli.report import pyplot_for_files
from ..common.config_checks import at_least, check_positive
from ..common.run_folder import PROGRAM, writable_folder
from ..common.spelling import did_you_mean


EMBEDDED_TASKS = ("sums", "reachability", "equations", "facts", "sentences")
WRITTEN_BY_US = ("latent_reasoning.json", "training_args.json")
FILE_TASKS = ("gsm8k", "gsm_hard", "svamp", "multiarith")


def parser() -> CommandLine:
    """The parser of this command."""
    made = CommandLine(
        prog=f"{PROGRAM} eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("checkpoint", help="a folder or hub id: an adapter or a whole model of any kind")
    made.add_argument(
        "--tasks",
        nargs="+",
        help=f"any of {', '.join(EMBEDDED_TASKS)} (embedded), {', '.join(FILE_TASKS)} (with --data), and tasks of "
        "lm-evaluation-harness (default: the embedded task of this kind of model)",
    )
    made.add_argument("--include_path", help="a folder with more tasks for lm-evaluation-harness, as YAML files")
    made.add_argument(
        "--data", nargs="+", default=[], metavar="TASK=FILE", help="the files of tasks (docs/evaluation.md)"
    )
    made.add_argument(
        "--states", nargs="+", help="what is done to the latent steps (default: on, and off if there is one)"
    )
    made.add_switch("--ablations", "all states of this kind of model")
    made.add_argument(
        "--samples", type=int, default=1, help="texts for each question; more than 1 are sampled (default: 1)"
    )
    made.add_argument("--temperature", type=float, default=1.0, help="of sampling, and of soft embeddings (default: 1)")
    made.add_argument("--limit", type=int, help="ask only this many of the first questions")
    made.add_argument("--num_fewshot", type=int, default=0, help="solved examples before each question (default: 0)")
    made.add_argument(
        "--max_new_tokens", type=int, help="longest answer in tokens (default: 512; embedded tasks have their own)"
    )
    made.add_argument("--batch_size", type=int, default=64, help="prompts per batch (default: 64)")
    made.add_argument(
        "--engine", choices=("transformers", "vllm"), default="transformers", help="what decodes (docs/vllm.md)"
    )
    made.add_switch("--load_in_4bit", "load the base model in 4 bits")
    made.add_argument(
        "--dtype", help="such as bfloat16 (default: that of the weights; HRPO: float32 on a CPU, bfloat16 on a GPU)"
    )
    made.add_argument(
        "--system_prompt",
        help="of a model with a chat template; '' for none (default: one that asks for reasoning and the delimiter; for "
        "tasks of lm-evaluation-harness none)",
    )
    made.add_argument("--answer_delimiter", help="the text before an answer (default: that of the training, else ####)")
    made.add_argument("--held_out", type=int, default=400, help="rows of an embedded task (default: 400)")
    made.add_argument("--seed", type=int, default=0, help="of sampling, and of embedded tasks (default: 0)")
    made.add_argument(
        "--output", help="folder of the results (default: CHECKPOINT if it is one of ours, else this one)"
    )
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print the table, and write the results. Return 0."""
    flags = parser().parse_args(argv)
    at_least(flags, samples=1, limit=1, num_fewshot=0, max_new_tokens=1, batch_size=1, held_out=1)
    check_positive(temperature=flags.temperature)
    if not 0 <= flags.seed < 2**32:
        raise ValueError(f"--seed {flags.seed}: from 0 to {2**32 - 1}")
    if flags.answer_delimiter == "":
        raise ValueError("--answer_delimiter '': give the text before an answer, such as '####'")
    if flags.states and flags.ablations:
        raise ValueError("--states and --ablations: give one of them; --ablations is all states")
    if flags.include_path and not Path(flags.include_path).is_dir():
        raise ValueError(f"--include_path {flags.include_path}: there is no such folder")
    files = files_of(flags.data, flags.tasks or ())
    if importlib.util.find_spec("lm_eval") is None:
        raise ImportError("evaluation needs lm-evaluation-harness: pip install 'latent-reasoning-trl[eval]'")
    ours = any(Path(flags.checkpoint, name).is_file() for name in WRITTEN_BY_US)
    folder = writable_folder(flags.output or (flags.checkpoint if ours else "."), "--output")
    console = PlainConsole()
    # lm-eval and torch, after all that can be wrong without them
    from .run import ASKS_FOR_STEPS, evaluate_tasks

    results, harness, samples = evaluate_tasks(flags, files)
    if results:
        show(console, flags.checkpoint, results)
        if flags.system_prompt is None and any(
            ASKS_FOR_STEPS in rows[0].get("prompt", "") for rows in samples.values()
        ):
            console.print(
                "Questions come after a system prompt that asks for steps; --system_prompt changes it, '' omits it."
            )
    if harness:
        show_harness(console, flags.checkpoint, harness)
    given = {name: value for name, value in vars(flags).items() if value not in (None, [])}
    found = {"checkpoint": flags.checkpoint, "flags": given, "results": [result.numbers() for result in results]}
    (folder / "eval.json").write_text(json.dumps(found | {"harness": harness}, indent=1) + "\n")
    for (task, state), rows in samples.items():
        lines = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
        (folder / f"samples_{task.replace('/', '_')}_{state}.jsonl").write_text(lines)
    if results:
        draw(folder / "eval.png", Path(flags.checkpoint).name, results)
    picture = f", {folder / 'eval.png'}" if results else ""
    console.print(f"Written: {folder / 'eval.json'}{picture}, {folder}/samples_*.jsonl")
    return 0


def files_of(data: Sequence[str], tasks: Sequence[str]) -> dict[str, str]:
    """The files of tasks by name.

    Raises:
        ValueError: a word is not TASK=FILE, its task needs no file or is not evaluated, or a task has no file.
    """
    files: dict[str, str] = {}
    for word in data:
        name, equals, file = word.partition("=")
        if not equals or not file:
            raise ValueError(f"--data {word}: write TASK=FILE, such as gsm8k=test.jsonl")
        if name not in FILE_TASKS:
            raise ValueError(f"--data {word}: {name} reads no file{did_you_mean(name, FILE_TASKS)}")
        if name not in tasks:
            raise ValueError(f"--data {word}: {name} is not among --tasks; add it there")
        if name in files:
            raise ValueError(f"--data {word}: {name} has a file already, {files[name]}")
        files[name] = file
    for name in tasks:
        if name in FILE_TASKS and name not in files:
            raise ValueError(
                f"--tasks {name}: its file is yours: --data {name}=FILE (docs/evaluation.md has the format)"
            )
    return files


def show(console: PlainConsole, title: str, results: list[Any]) -> None:
    """Print a row for each result."""
    most = max(result.samples for result in results)
    found, cost = Table(title=title, title_justify="left"), Table(title="Means of a text", title_justify="left")
    sampled = [f"pass@{max(results[0].pass_at)}", f"maj@{max(results[0].maj_at)}"] if most > 1 else []
    for table, heads in (
        (found, ["n", "accuracy (95% interval)", *sampled]),
        (cost, ["tokens", "forward passes", "latent", "ms"]),
    ):
        for head in ("task", "latent steps", *heads):
            table.add_column(head, justify="right" if head in heads else "left")
    for r in results:
        cells = [r.task, r.state, str(r.n), f"{r.accuracy:.1%} ({r.low:.1%} to {r.high:.1%})"]
        cells += [f"{share[max(share)]:.1%}" for share in (r.pass_at, r.maj_at) if sampled]
        found.add_row(*cells)
        cost.add_row(
            r.task, r.state, f"{r.tokens:.1f}", f"{r.forwards:.1f}", f"{r.latent_share:.1%}", f"{1000 * r.seconds:.2f}"
        )
    console.print(found)
    console.print(cost)
    console.print(
        "Latent: latent steps over forward passes, above 100% where one pass makes several. Milliseconds: of decoding, in "
        "batches."
    )


def show_harness(console: PlainConsole, title: str, found: list[dict[str, Any]]) -> None:
    """Print a row for each metric of the harness's tasks."""
    table = Table(title=f"{title}: tasks of lm-evaluation-harness", title_justify="left")
    for head in ("task", "latent steps", "metric", "filter"):
        table.add_column(head)
    for head in ("n", "value", "standard error"):
        table.add_column(head, justify="right")
    for row in found:
        error = "-" if row["stderr"] is None else f"{row['stderr']:.4f}"
        cells = [row[name] for name in ("task", "state", "metric", "filter")]
        table.add_row(*cells, str(row["n"]), f"{row['value']:.4f}", error)
    console.print(table)


def draw(file: Path, title: str, results: list[Any]) -> None:
    """Draw accuracy by state with its interval, and by question length."""
    pyplot = pyplot_for_files()
    tasks = list(dict.fromkeys(result.task for result in results))
    figure, axes = pyplot.subplots(
        len(tasks), 2, figsize=(9, 3.2 * len(tasks)), layout="constrained", squeeze=False, sharey="row"
    )
    for (left, right), task in zip(axes, tasks, strict=True):
        some = [result for result in results if result.task == task]
        values = [100 * r.accuracy for r in some]
        bounds = [[100 * (r.accuracy - r.low), 100 * (r.high - r.accuracy)] for r in some]
        spread = [[max(0.0, pair[side]) for pair in bounds] for side in (0, 1)]  # rounding may leave -1e-16
        left.bar([r.state for r in some], values, color="#9db8d9", yerr=spread, capsize=3, ecolor="#2b5d9b")
        left.set_title(f"{task}: accuracy by what is done to latent steps, %", loc="left", fontsize=10)
        for r in some:
            longest = [length for length, _, _ in r.by_length]
            right.plot(longest, [100 * share for _, _, share in r.by_length], marker="o", label=r.state, linewidth=1.2)
        right.set_title("by length of the question (quarters)", loc="left", fontsize=10)
        right.locator_params("x", integer=True)
        right.set_xlabel("characters of the longest question of a quarter")
        right.legend(frameon=False, fontsize=8)
        for axis in (left, right):
            axis.set_ylim(0, 104)
            axis.spines[["top", "right"]].set_visible(False)
            axis.grid(alpha=0.3, axis="y")
    figure.suptitle(title)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
