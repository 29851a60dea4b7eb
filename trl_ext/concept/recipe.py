"""Shared parts of the recipes for concept tokens: flags, data, a training run and its report."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.table import Table
from transformers import PreTrainedTokenizerBase, set_seed

from trl_ext.cli.console import PlainConsole
from unsloth_ext.common.hub import load_causal_lm, load_tokenizer
from unsloth_ext.concept.model import ConceptModel

from ..cli.flags import chosen, chosen_preset
from ..cli.parser import RecipeParser
from ..cli.recipe import RecipeArguments, check_tiny, finish, start
from ..cli.report import compact_progress
from ..common.config_checks import at_least
from ..tasks import facts, warm_start
from ..tasks.completions import completions, plain
from ..tasks.data import DataArguments
from ..tasks.evaluation import AccuracyCallback
from .config import PRESETS, ConceptConfig
from .evaluation import ConceptEvaluation, evaluate_concepts
from .method import METHOD
from .trainer import ConceptTrainer
from .visualization import page_of


EMBEDDED = ("tiny", "smollm2")
PAGE_TEXTS = 12
BASE = "without concepts, before"  # the model that training begins with


@dataclass
class ScriptArguments(RecipeArguments):
    """The recipes' own flags, besides the trainer's configuration."""

    preset: str | None = field(default=None, metadata={"help": f"Name of a set of extensions: {', '.join(PRESETS)}."})
    base_steps: int = field(
        default=facts.SMALL.warm_start_steps, metadata={"help": "Number of SFT steps that train the tiny model."}
    )
    max_new_tokens: int = field(
        default=256, metadata={"help": "Maximum number of tokens of a completion in evaluation."}
    )
    answer_delimiter: str = field(default="####", metadata={"help": "Text before the answer in a completion."})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, base_steps=1, max_new_tokens=1)


def parse(argv: list[str], script_class: type[ScriptArguments], configs: Path, **instead: Any) -> tuple:
    """The arguments of script, data and trainer.

    Flags override `instead`, which overrides the configuration file, which overrides the preset that flags or file
    name.
    """
    parser = RecipeParser((script_class, DataArguments, ConceptConfig), EMBEDDED, instead)
    _, config, others = chosen(argv, configs, "concept", EMBEDDED)
    preset = chosen_preset(config, others)
    if preset:
        parser.set_defaults_with_config(**ConceptConfig.preset_fields(preset))
    return parser.parse_args_and_config(["--config", str(config), *others])


@dataclass
class Task:
    """A model's folder or hub id, its tokenizer, and rows with `prompt`, `completion`, `answer`."""

    base: str
    tokenizer: PreTrainedTokenizerBase
    train: Dataset
    held_out: Dataset
    delimiter: str | None


def load(script: ScriptArguments, data: DataArguments, args: ConceptConfig) -> Task:
    """The built-in task, or the model and data that the flags name."""
    check_tiny(script.model_name, data.dataset)
    if script.model_name == "tiny":
        base = warm_start.tiny_with_facts(
            Path(script.cache_dir),
            seed=script.warm_start_seed,
            held_out=script.eval_size,
            steps=script.base_steps,
            progress=not args.disable_tqdm,
        )
        train, held_out = facts.split(script.eval_size, script.warm_start_seed)
        return Task(base, load_tokenizer(base), train, held_out, None)
    base = warm_start.smollm2(Path(script.cache_dir)) if script.model_name == "smollm2" else script.model_name
    tokenizer = load_tokenizer(base, trust_remote_code=args.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    examples, *both = data.split(
        train_size=script.train_size, eval_dataset=script.eval_dataset, eval_size=script.eval_size, seed=args.seed
    )
    train, held_out = (
        plain(completions(rows, tokenizer, script.answer_delimiter, examples), tokenizer) for rows in both
    )
    return Task(base, tokenizer, train, held_out, script.answer_delimiter)


def train(
    task: Task, script: ScriptArguments, args: ConceptConfig, console: PlainConsole, output: Path, resume: str | None
) -> tuple[ConceptTrainer, ConceptEvaluation, AccuracyCallback]:
    """Train one run and save its model in `output / "final"`."""
    how = evaluation_options(task, script, args)
    accuracy = AccuracyCallback(
        script.eval_every, lambda model: evaluate_concepts(model, task.tokenizer, task.held_out, **how)
    )
    set_seed(args.seed)
    model = load_causal_lm(task.base, method="concept", trust_remote_code=args.trust_remote_code)
    trainer = ConceptTrainer(
        model,
        args,
        train_dataset=task.train,
        eval_dataset=task.held_out if args.eval_strategy != "no" else None,
        processing_class=task.tokenizer,
        peft_config=script.lora(),
        callbacks=[accuracy],
    )
    compact_progress(trainer)
    trainer.train(resume_from_checkpoint=resume)
    after = evaluate_concepts(trainer.model, task.tokenizer, task.held_out, **how)
    trainer.save_model(str(output / "final"))
    return trainer, after, accuracy


def base_evaluation(task: Task, script: ScriptArguments, args: ConceptConfig) -> ConceptEvaluation:
    """Evaluate the model before concepts are attached."""
    model = load_causal_lm(task.base, method="concept", trust_remote_code=args.trust_remote_code)
    model.to("cuda" if torch.cuda.is_available() and not args.use_cpu else "cpu")
    return evaluate_concepts(model, task.tokenizer, task.held_out, **evaluation_options(task, script, args))


SHOWN = (
    ("accuracy", "accuracy", "{:.1%}"),
    ("token_accuracy", "tokens predicted as most likely", "{:.1%}"),
    ("nll", "NLL, nats per token", "{:.3f}"),
    ("nll_boundary", "  after a concept", "{:.3f}"),
    ("nll_tail", "  after other tokens", "{:.3f}"),
    ("nll_random", "  with random concepts", "{:.3f}"),
    ("nll_tail_random", "    after other tokens", "{:.3f}"),
    ("ratio", "tokens per concept", "{:.2f}"),
    ("bits", "bits of concepts per token", "{:.2f}"),
    ("tail", "tokens in the tail", "{:.1f}"),
    ("perplexity", "perplexity of the codewords", "{:.1f}"),
    ("used", "codewords used", "{:.0%}"),
    ("macs", "multiplications (counted)", "{:.0%}"),
    ("kv", "keys and values (counted)", "{:.0%}"),
)


def comparison(rows: dict[str, ConceptEvaluation], console: PlainConsole) -> None:
    """Print evaluations side by side. Values that a model without concepts lacks are left empty."""
    table = Table(title=f"Held-out texts: {next(iter(rows.values())).n}", title_justify="left")
    for head in ("", *rows):
        table.add_column(head, justify="right" if head else "left", no_wrap=True)
    for name, label, form in SHOWN:
        values = [getattr(r, name) for r in rows.values()]
        if any(value is not None for value in values):
            table.add_row(label, *("" if value is None else form.format(value) for value in values))
    console.print(table)


def evaluation_options(task: Task, script: ScriptArguments, args: ConceptConfig) -> dict[str, Any]:
    """Keywords of `evaluate_concepts`."""
    return {
        "delimiter": task.delimiter,
        "max_new_tokens": script.max_new_tokens,
        "batch_size": script.eval_batch,
        "progress": not args.disable_tqdm and args.process_index == 0,
    }


def show_pieces(trainer: ConceptTrainer, task: Task, console: PlainConsole, title: str) -> None:
    """Write `concepts.html` to the run's folder: held-out texts, split into the pieces that their concepts stand for.

    All processes have to call it.
    """
    rows = task.held_out.select(range(min(PAGE_TEXTS, len(task.held_out))))
    page = Path(trainer.args.output_dir) / "concepts.html"
    texts = [row["prompt"] + row["completion"] for row in rows]
    made = page_of(ConceptModel(trainer.model, task.tokenizer), texts, title)
    if trainer.is_world_process_zero():
        page.write_text(made)
    console.print(f"Written: {page}")


def run(parser_result: tuple, runs: dict[str, ConceptConfig], title: str) -> None:
    """Train runs one after the other, and compare them with the model that they started from.

    Args:
        parser_result: arguments of script, data and trainer. The trainer's output folder holds everything.
        runs: configurations by name. A single run trains in the output folder itself.
        title: title of the pictures.
    """
    script, data, args = parser_result
    started = time.time()
    for config in runs.values():
        console, _, resume = start(config, script)
    task = load(script, data, args)
    rows = {BASE: base_evaluation(task, script, args)}
    for name, config in runs.items():
        if len(runs) > 1:
            console.print(f"Training {name}")
        trainer, after, accuracy = train(task, script, config, console, Path(config.output_dir), resume)
        rows[name] = after
        if config.use_concepts:
            show_pieces(trainer, task, console, f"{title}: {name}, {script.model_name}")
        if not trainer.is_world_process_zero():
            continue
        finish(
            trainer,
            console,
            started,
            (title, name, script.model_name, data.dataset),
            accuracy,
            after,
            METHOD.curves,
            base=rows[BASE].numbers(),
            script=asdict(script),
            data=asdict(data),
        )
    if args.process_index == 0:
        comparison(rows, console)


def refuse_resume(args: ConceptConfig) -> None:
    """Raise a ValueError: several runs have several checkpoints, so resuming needs a single run."""
    if args.resume_from_checkpoint:
        raise ValueError("--resume_from_checkpoint: name one run with --baseline, and resume it")
