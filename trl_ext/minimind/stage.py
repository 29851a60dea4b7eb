"""Shared parts of all stages: flags, data, the previous stage's model, and the report at the end."""

import inspect
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.table import Table
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from patches import fused_lm_head, granite_router_logits
from patches.versions import installed_version
from trl_ext.cli.command_line import CommandLine
from trl_ext.cli.console import PlainConsole
from unsloth_ext.common.hub import load_causal_lm, load_tokenizer
from unsloth_ext.common.vllm_installed import require_vllm

from ..cli.card import complete_card
from ..cli.flags import found_config
from ..cli.parser import RecipeParser
from ..cli.recipe import start
from ..cli.report import compact_progress, plot_curves, write_summary
from ..common.checkpointing import SafeCheckpointMixin
from ..common.config_checks import at_least
from ..common.run_folder import finished
from ..tasks import arithmetic
from ..tasks.files import DataError
from ..tasks.warm_start import cached
from . import embedded
from .data import load_minimind_data
from .embedded import write_embedded
from .provenance import changes, origin, remember


logger = logging.get_logger(__name__)

EMBEDDED = "embedded"
CURVES = (
    ("accuracy", "held-out accuracy"),
    ("loss", "loss"),
    ("reward", "sampled reward"),
    ("rewards/accuracies", "preference accuracy, training"),
    ("completions/mean_length", "completion length, tokens"),
    ("loss/kl", "KL(teacher || student)"),
    ("spo/value", "tracked value"),
    ("ppo/value_loss", "critic's loss"),
)


@dataclass
class FolderArguments:
    """The folder of all stages."""

    run_dir: str = field(default="runs/minimind", metadata={"help": "Folder of all stages and of the built-in data."})
    begun: tuple[PlainConsole, Path, str | None] | None = field(default=None, init=False)  # from `start`
    made_from: dict[str, Any] | None = field(default=None, init=False)  # see `origin`


@dataclass
class DataStageArguments(FolderArguments):
    """Flags of a stage that starts without a model."""

    flags_title = "Model, data and evaluation"

    dataset: str = field(
        default=EMBEDDED, metadata={"help": "A JSONL file in MiniMind's format, or 'embedded' for the built-in data."}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Held-out file; without one, the last eval_size rows of dataset are held out."}
    )
    train_size: int | None = field(default=None, metadata={"help": "Use at most this many training rows."})
    eval_size: int = field(default=300, metadata={"help": "Number of held-out rows."})
    eval_every: int = field(
        default=0,
        metadata={"help": "Number of steps between measurements of the held-out metric; 0: before and after."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete an earlier run in output_dir and start over."})
    embedded_seed: int = field(default=0, metadata={"help": "Seed of the built-in data."})

    def __post_init__(self) -> None:
        at_least(self, train_size=1, eval_size=1, eval_every=0)

    def file(self, kind: str) -> Path:
        """The file with the built-in rows of a kind; it is written on first use."""
        seed = self.embedded_seed
        parts = [*map(inspect.getsource, (embedded, arithmetic)), str(installed_version("reasoning-gym"))]
        folder = cached(Path(self.run_dir), f"data-{seed}", parts, lambda part: write_embedded(part, seed))
        return Path(folder, f"{kind}.jsonl")

    def load(self, name: str, kind: str) -> tuple[Dataset, Dataset]:
        """The (training, held-out) rows of a kind of `load_minimind_data`.

        Training rows that are also held out are dropped.

        Args:
            name: name of the built-in data.
            kind: kind of `load_minimind_data`.

        Raises:
            DataError: from `load_minimind_data`, or there are too few rows.
        """
        if self.dataset == EMBEDDED:
            train, held_out = (load_minimind_data(self.file(f"{name}{side}"), kind) for side in ("", "_eval"))
        elif self.eval_dataset:
            train, held_out = (load_minimind_data(file, kind) for file in (self.dataset, self.eval_dataset))
        else:
            rows = load_minimind_data(self.dataset, kind)
            first = len(rows) - self.eval_size
            if first < 1:
                raise DataError(
                    f"dataset {self.dataset} has {len(rows)} row(s), and eval_size={self.eval_size} are held out: "
                    "no row is left to train on; lower eval_size, or name an eval_dataset"
                )
            train, held_out = rows.select(range(first)), rows.select(range(first, len(rows)))
        held_out = held_out.select(range(min(self.eval_size, len(held_out))))
        if self.dataset != EMBEDDED:
            train = self._without(train, held_out)
        return train.select(range(min(self.train_size or len(train), len(train)))), held_out

    def _without(self, rows: Dataset, others: Dataset) -> Dataset:
        """The rows whose first column is not among the others' first column."""
        name, seen = rows.column_names[0], {json.dumps(value) for value in others[others.column_names[0]]}
        batches = rows.select_columns(name).iter(1000)
        new = [json.dumps(value) not in seen for batch in batches for value in batch[name]]
        if all(new):
            return rows
        if not any(new):
            raise DataError(f"dataset {self.dataset}: all of its {len(rows)} training rows are held out too")
        logger.warning(
            f"dataset {self.dataset}: {new.count(False)} of its rows are held out too; they are not used for training"
        )
        return rows.select([i for i, keep in enumerate(new) if keep])


@dataclass
class StageArguments(DataStageArguments):
    """Flags of a stage, besides its trainer's configuration."""

    model_name: str = field(default="", metadata={"help": "Hub id or folder of the initial model."})


def parse(recipe: str, stage: type[FolderArguments], *configs: type) -> tuple[Any, ...]:
    """Parse the flags, which override a configuration file, by default `configs/<recipe>_tiny.yaml` beside the recipe.

    The stage's output folder belongs to this run from here on. If the model of a previous stage does not exist, that
    stage's recipe is run first; this is done for the built-in data only.
    """
    path, parser = Path(recipe), RecipeParser((stage, *configs))
    peek = CommandLine(add_help=False)
    peek.add_argument("--config", type=Path, default=path.parent / "configs" / f"{path.stem}_tiny.yaml")
    given, flags = peek.parse_known_args(sys.argv[1:])
    given.config = found_config(given.config, path.parent / "configs")
    parsed = parser.parse_args_and_config(["--config", str(given.config), *flags])
    if getattr(parsed[-1], "use_vllm", False):
        require_vllm("use_vllm=True")
    if isinstance(parsed[-1], TrainingArguments):
        parsed[0].begun = start(parsed[-1], parsed[0])
    named = {"model_name": parsed[0], "teacher_model_name_or_path": parsed[-1]}
    named = {flag: getattr(arguments, flag, None) for flag, arguments in named.items()}
    models = list(named.values())
    for flag, name in named.items():
        _ensure(flag, name, parsed[0], path.parent)
    if int(os.environ.get("RANK", "0")) == 0:
        for sentence in dict.fromkeys(sentence for name in models if name for sentence in changes(name)):
            print(sentence, flush=True)
        parsed[0].made_from = origin(path, given.config, [name for name in models if name])
        if parsed[0].begun:
            remember(parsed[0].begun[1], parsed[0].made_from)
    return parsed


def _ensure(flag: str, name: str | None, stage: FolderArguments, recipes: Path) -> None:
    folder = Path(name or "")
    if not name or folder.exists() or not folder.is_relative_to(stage.run_dir):
        return
    before = folder.relative_to(stage.run_dir).parts[0]
    script = recipes / f"{before}.py"
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1
    embedded_data = getattr(stage, "dataset", EMBEDDED) == EMBEDDED and stage.run_dir == FolderArguments.run_dir
    if alone and script.exists() and embedded_data:
        print(f"{name} does not exist yet: running {script.name}", flush=True)
        done = subprocess.run([sys.executable, str(script)], check=False)
        if done.returncode:
            sys.exit(done.returncode)
    if not folder.exists():
        raise ValueError(f"--{flag} {name}: there is no such folder; run recipes/minimind/{before}.py first")


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model with float32 weights, from which bf16 is computed if configured, and its tokenizer."""
    return load_causal_lm(name, dtype=torch.float32), load_tokenizer(name)


def resumable(trainer: type[Trainer], mixin: type = SafeCheckpointMixin) -> type[Trainer]:
    """A stock trainer whose checkpoints hold no pickle and resume exactly."""
    return type(trainer.__name__, (mixin, trainer), {})


def run(
    recipe: str,
    stage: StageArguments,
    args: TrainingArguments,
    make_trainer: Callable[[], Trainer],
    measures: dict[str, Callable[[Trainer], float]],
    **more: Callable[[], Any],
) -> None:
    """Measure, train, and measure again. Writes `final/`, `summary.json` and `curves.png` to `args.output_dir`.

    Args:
        recipe: path of the recipe.
        stage: the stage's flags.
        args: the trainer's configuration.
        make_trainer: makes the trainer.
        measures: held-out metrics by name; the first is the stage's main metric.
        more: further values for the summary, computed at the end.
    """
    started = time.time()
    assert stage.begun is not None  # `parse` has called `start`
    console, output, resume = stage.begun
    fused_lm_head.ensure()
    granite_router_logits.ensure()
    trainer = make_trainer()
    compact_progress(trainer)
    main_metric = next(iter(measures))
    curve = MetricCurve(stage.eval_every, lambda: measured(trainer, {main_metric: measures[main_metric]})[main_metric])
    trainer.add_callback(curve)
    before = measured(trainer, measures)
    trainer.train(resume_from_checkpoint=resume)
    after = measured(trainer, measures)
    trainer.save_model(str(output / "final"))
    if not trainer.is_world_process_zero():
        return
    show(Path(recipe).stem, before, after, console)
    state = trainer.state
    plot_curves(output / "curves.png", state.log_history, [], f"{Path(recipe).stem}, {stage.dataset}", CURVES)
    write_summary(
        output,
        stage=Path(recipe).stem,
        before=before,
        after=after,
        curve_of=main_metric,
        curve=dict([(0, before[main_metric]), *curve.points, (state.global_step, after[main_metric])]),
        steps=state.global_step,
        seconds=round(time.time() - started, 1),
        **{name: value() for name, value in more.items()},
        history=[entry for entry in state.log_history if "loss" in entry or "reward" in entry],
    )
    for sentence in complete_card(output / "final", output)[1]:
        console.print(sentence)
    finished(output, state.global_step)
    console.print(f"Written: {output / 'final'}, {output / 'summary.json'}, {output / 'curves.png'}")


class MetricCurve(TrainerCallback, ExportableState):
    """Measure a held-out metric every some steps. Checkpoints hold the values, so a resumed run shows all of them.

    Args:
        every: number of steps between measurements; 0: none.
        measure: returns the metric.

    Attributes:
        points: (step, value) pairs.
    """

    def __init__(self, every: int, measure: Callable[[], float]):
        self.every, self.measure = every, measure
        self.points: list[tuple[int, float]] = []

    def state(self) -> dict[str, Any]:
        """The state for trainer_state.json."""
        return {"args": {}, "attributes": {"points": [list(point) for point in self.points]}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        # A checkpoint of an earlier version has no entry for it, but saving needs one
        saved = state.stateful_callbacks.setdefault(type(self).__name__, self.state())["attributes"]
        self.points = [(step, value) for step, value in saved["points"] if step <= state.global_step]

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.every and state.global_step % self.every == 0 and state.global_step < state.max_steps:
            self.points.append((state.global_step, self.measure()))


def measured(trainer: Trainer, measures: dict[str, Callable[[Trainer], float]]) -> dict[str, float]:
    """Compute each metric. The random state of the training does not change."""
    with torch.random.fork_rng():
        return {name: measure(trainer) for name, measure in measures.items()}


def show(title: str, before: dict[str, float], after: dict[str, float], console: PlainConsole) -> None:
    """Print metrics before and after, side by side."""
    table = Table(title=title, title_justify="left")
    for heading in ("held out", "before", "after"):
        table.add_column(heading, justify="left" if heading == "held out" else "right")
    for name in after:
        table.add_row(name, readable(name, before[name]), readable(name, after[name]))
    console.print(table)


def readable(metric: str, value: float) -> str:
    """A metric as text: accuracies in percent, large numbers with thousands separators, others with four digits."""
    if "accuracy" in metric:
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
