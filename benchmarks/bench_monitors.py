"""Cost of the planner's monitors: time of a step with all of them relative to a step without.

    make bench-planner                     # with the other parts
    python -m benchmarks.bench_monitors --rounds 5

With monitors: the callback with its default of a probe every 50 steps, and the values that the trainer computes at
every step. Without: no callback, and these functions return zeros. Both are measured in turn, in one process, with
random weights and texts of random letters. Writes benchmarks/results/monitors_<device>.json.
"""

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from unittest import mock

import torch
from datasets import Dataset
from rich.table import Table
from transformers import TrainerCallback

from benchmarks import setups
from trl_ext import PlannerExecutorConfig, PlannerExecutorTrainer
from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.console import PlainConsole
from trl_ext.cli.user_errors import in_sentences
from trl_ext.planner import monitors
from trl_ext.planner.monitor_callback import PlannerMonitorCallback


TYPES = [{"name": "what", "num_concepts": 256, "quota": 6}, {"name": "how", "num_concepts": 64, "quota": 2}]
# Size of `setups.qwen2`, training, tokens per text, batch size. In the first case, Python takes most of a step
CASES = {
    "0.5M parameters, soft": ("check", "soft", 16, 8),
    "13M parameters, soft": ("cpu", "soft", 32, 8),
    "13M parameters, hard-EM": ("cpu", "hard_em", 32, 8),
}
if setups.CUDA:
    CASES = {f"1.5B parameters, {training}": ("1.5b", training, 256, 8) for training in ("soft", "hard_em")}
EVERY = PlannerMonitorCallback().every


class Clock(TrainerCallback):
    """Measures the seconds from the end of the first step to the end of the last."""

    def on_step_end(self, args, state, control, **_):
        if setups.CUDA:
            torch.cuda.synchronize()
        now = time.perf_counter()
        if state.global_step == 1:
            self.start = now
        self.seconds = now - self.start


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Replace what the trainer computes for the monitors by zeros."""
    nothing = torch.zeros(())
    with (
        mock.patch.object(monitors, "cosine_and_l2", lambda *_: (nothing, nothing)),
        mock.patch.object(monitors, "entropy_and_max_prob", lambda *_: (nothing, nothing)),
        mock.patch.object(monitors.GradientNorm, "watch", lambda *_: None),
    ):
        yield


def seconds_per_step(case: str, watched: bool, steps: int) -> float:
    """Seconds per step of a run, without the first step."""
    size, training, tokens, batch = CASES[case]
    model = setups.qwen2(size)
    tokenizer = setups.tokenizer(model.config.vocab_size)
    letters = (97 + torch.randint(26, (256, tokens), generator=torch.Generator().manual_seed(0))).tolist()
    rows = [{"prompt": "", "completion": "".join(map(chr, codes))} for codes in letters]  # one token per letter
    args = PlannerExecutorConfig(
        **{**setups.few_steps("bfloat16" if setups.CUDA else "float32", steps + 1), "logging_steps": 10},
        per_device_eval_batch_size=batch,
        types=TYPES,
        mode="reconstruct",
        training=training,
        max_length=None,
        gradient_checkpointing=False,
    )
    clock = Clock()
    callbacks = [clock, PlannerMonitorCallback(every=EVERY)] if watched else [clock]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        trainer = PlannerExecutorTrainer(
            model, args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=callbacks
        )
        with contextlib.nullcontext() if watched else unwatched():
            trainer.train()
    logged = {name for entry in trainer.state.log_history for name in entry if name.startswith("monitor/")}
    assert ("monitor/delta_nll_null" in logged) == watched
    return clock.seconds / steps


def page(found: dict) -> str:
    """The table of benchmarks/results/monitors_<device>.md."""
    lines = [
        "# What the planner's monitors cost",
        "",
        f"A step with the monitor callback (a probe every {found['every']} steps) and the figures of every step, against "
        f"one without: how much longer it takes. Median of {found['rounds']} rounds (lowest to highest).",
        "",
        "| model, training | longer by | ms a step | without |",
        "|---|---|---:|---:|",
    ]
    for case, r in found["results"].items():
        share = {k: f"{v - 1:.1%}" for k, v in r["with_over_without"].items()}
        ms = r["ms_per_step"]
        lines.append(
            f"| {case} | {share['median']} ({share['lowest']} to {share['highest']}) | {ms['with']:.0f} | "
            f"{ms['without']:.0f} |"
        )
    return "\n".join(lines)


TABLES = {"monitors": page}


def main() -> None:
    parser = CommandLine(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=EVERY, help="steps per run; there is a probe every 50")
    options = parser.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)  # hide advice, which is meaningless for random weights
    results = {}
    for case in CASES:
        times: dict[bool, list[float]] = {True: [], False: []}
        for _ in range(options.rounds):
            for watched in (True, False):
                times[watched].append(seconds_per_step(case, watched, options.steps))
        results[case] = {
            "ms_per_step": {"with": 1000 * min(times[True]), "without": 1000 * min(times[False])},
            "with_over_without": setups.quotient(times[True], times[False]),
        }
    table = Table(title=f"Monitors, a probe every {EVERY} steps", title_justify="left")
    for head in ("", "ms/step", "without", "with / without"):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for case, r in results.items():
        ratio = r["with_over_without"]
        table.add_row(
            case,
            f"{r['ms_per_step']['with']:.0f}",
            f"{r['ms_per_step']['without']:.0f}",
            f"{ratio['median']:.3f} ({ratio['lowest']:.3f} to {ratio['highest']:.3f})",
        )
    PlainConsole().print(table)
    about = {"command": "make bench-planner", "every": EVERY, "rounds": options.rounds}
    path = setups.write("monitors", {**about, "results": results})
    setups.write_table(path, page)
    print(path)


if __name__ == "__main__":
    in_sentences()
    main()
