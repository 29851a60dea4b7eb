"""What the recipes of latent distillation (`recipes/codi_gsm8k.py` and others) do: flags, data, training, evaluation."""

import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset
from torch import nn
from transformers import PreTrainedTokenizerBase, Trainer, set_seed

from trl_ext.cli.console import PlainConsole
from unsloth_ext.common import hub
from unsloth_ext.common.ablations import ABLATIONS
from unsloth_ext.common.vllm_installed import require_vllm
from unsloth_ext.latent.engine import LatentEngine

from ..cli.flags import chosen, chosen_preset
from ..cli.parser import RecipeParser
from ..cli.recipe import RecipeArguments, check_tiny, finish, start
from ..cli.report import compact_progress, comparison_table
from ..common.config_checks import at_least
from ..tasks import equations, warm_start
from ..tasks.data import without
from ..tasks.evaluation import AccuracyCallback
from .config import LatentArguments
from .evaluation import LatentEvaluation, evaluate_answers
from .method import METHOD
from .presets import LORA
from .sources import Rows, load_rows
from .trainer import LatentTrainer


EMBEDDED = ("tiny",)


@dataclass
class LatentRecipeArguments(RecipeArguments):
    """Flags of every recipe that trains latent tokens, besides the trainer's configuration."""

    dataset: str = field(
        default="tiny",
        metadata={
            "help": "A hub id or a .jsonl, .json, .parquet or .txt file: GSM8K-Aug, GSM8K, or question, steps, answer; "
            "'tiny' is the built-in task."
        },
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset ('main')."})
    eval_dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the held-out dataset."})
    sft_steps: int = field(
        default=equations.SMALL.warm_start_steps, metadata={"help": "Steps of the tiny model's warm start."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, sft_steps=1)


@dataclass
class ScriptArguments(LatentRecipeArguments):
    """The flags of distillation, besides the trainer's configuration."""

    preset: str | None = field(default=None, metadata={"help": "Name of published settings (docs/latent.md)."})
    max_new_tokens: int = field(
        default=256, metadata={"help": "Maximum number of tokens of an answer in evaluation, explicit steps included."}
    )
    engine: Literal["transformers", "vllm"] = field(
        default="transformers", metadata={"help": "What decodes the answers of evaluation (docs/vllm.md)."}
    )
    lora_r: int = field(default=LORA["r"], metadata={"help": "Rank of LoRA on all linear layers; 0: no LoRA."})
    lora_alpha: int = field(default=LORA["lora_alpha"], metadata={"help": "Scale of LoRA."})
    lora_dropout: float = field(default=LORA["lora_dropout"], metadata={"help": "Dropout of LoRA."})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, max_new_tokens=1)
        if self.engine == "vllm":
            require_vllm("engine='vllm'")


def parse(
    argv: list[str], method: str, config_class: type[LatentArguments], configs: Path
) -> tuple[ScriptArguments, LatentArguments]:
    """Parse the flags. They override the configuration file, which overrides the preset that either of them names."""
    parser = RecipeParser((ScriptArguments, config_class), EMBEDDED)
    _, config, others = chosen(argv, configs, method, EMBEDDED)
    preset = chosen_preset(config, others)
    if preset:
        parser.set_defaults_with_config(**config_class.preset_fields(preset))
    script, args = parser.parse_args_and_config(["--config", str(config), *others])
    if script.engine == "vllm" and args.world_size > 1:
        raise ValueError(
            "--engine vllm: vLLM evaluates in one process, and this run has several; leave it out, and use "
            "recipes/eval_latent.py --engine vllm after training"
        )
    return script, args


def load_data(
    script: LatentRecipeArguments, console: PlainConsole, need_steps: bool = True
) -> tuple[Rows, list[dict[str, Any]]]:
    """The training rows and the held-out rows. Held-out rows need no steps. Unusable rows are counted on the screen."""
    if script.dataset == "tiny":
        made, held_out = equations.split(script.eval_size, script.warm_start_seed)
        return Rows("tiny", made, len(made)), held_out
    train = load_rows(script.dataset, config=script.dataset_config, size=script.train_size, need_steps=need_steps)
    if script.eval_dataset:
        found = load_rows(
            script.eval_dataset,
            split="test",
            config=script.eval_dataset_config,
            size=script.eval_size,
            need_steps=False,
        )
        console.print(found.report())
        held_out = found.usable
    else:
        if len(train.usable) <= script.eval_size:
            raise ValueError(
                f"dataset {script.dataset} has {len(train.usable)} usable rows; --eval_size {script.eval_size} leaves none "
                "to train on"
            )
        held_out, train.usable = train.usable[-script.eval_size :], train.usable[: -script.eval_size]
    both = len(train.usable)
    train.usable = without(train.usable, held_out)
    if not train.usable:
        raise ValueError(
            f"every question of {script.dataset} is held out in {script.eval_dataset or 'its last rows'}: no row is "
            "left to train on"
        )
    if both > len(train.usable):
        console.print(f"{both - len(train.usable)} training rows are held-out questions and were removed")
    return train, held_out


def load_tokenizer(script: ScriptArguments, args: LatentArguments) -> tuple[str, PreTrainedTokenizerBase]:
    """The folder or hub id of the base model, and its tokenizer. The tiny model is trained here if it is not in the
    cache."""
    name = script.model_name
    if name == "tiny":
        name = warm_start.tiny_with_steps(
            Path(script.cache_dir),
            seed=script.warm_start_seed,
            held_out=script.eval_size,
            steps=script.sft_steps,
            progress=not args.disable_tqdm,
        )
    tokenizer = hub.load_tokenizer(name, trust_remote_code=args.trust_remote_code)
    return name, tokenizer


def tokenized(
    train: Rows, held_out: list[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, args: LatentArguments
) -> dict[str, Dataset]:
    """`train_dataset` for a trainer, and `eval_dataset` if `args` asks for evaluation.

    The evaluation loss includes the teacher's, so `eval_dataset` has only rows with steps.
    """
    tokenize = args.rows(tokenizer)
    datasets = {"train_dataset": Dataset.from_list(train.map(tokenize))}
    if args.eval_strategy != "no":
        with_steps = Rows("held-out", [row for row in held_out if row["steps"]])
        datasets["eval_dataset"] = Dataset.from_list(with_steps.map(tokenize))
    return datasets


def evaluation_options(script: ScriptArguments, args: LatentArguments, model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of `evaluate_answers`."""
    return {
        "engine": LatentEngine(model) if script.engine == "vllm" else None,
        "answer_prompt": args.answer_prompt,
        "max_new_tokens": script.max_new_tokens,
        "batch_size": script.eval_batch,
        "progress": not args.disable_tqdm and args.process_index == 0,
    }


def ablated(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, Any]], how: dict[str, Any]
) -> dict[str, LatentEvaluation]:
    """Evaluations with each ablation of the latent tokens, by their names in the report."""
    return {
        f"latent tokens: {name}": evaluate_answers(model, tokenizer, rows, latents=name, **how) for name in ABLATIONS
    }


def report(
    trainer: Trainer,
    console: PlainConsole,
    started: float,
    script: LatentRecipeArguments,
    accuracy: AccuracyCallback,
    rows: dict[str, tuple[Any, LatentEvaluation]],
    **more: Any,
) -> None:
    """Print the table and write the run's files.

    Args:
        trainer: the trainer.
        console: where to print.
        started: `time.time()` at the start.
        script: the recipe's own flags.
        accuracy: what measured during training.
        rows: evaluations before and after training, by name; before may be None.
        **more: further values for the summary.
    """
    comparison_table(rows, console)
    finish(
        trainer,
        console,
        started,
        (trainer._name, script.model_name, script.dataset),
        accuracy,
        rows["latent tokens"][1],
        METHOD.curves,
        results={name: [found and found.numbers() for found in pair] for name, pair in rows.items()},
        script=asdict(script),
        **more,
    )


def train(
    argv: list[str],
    method: str,
    config_class: type[LatentArguments],
    trainer_class: type[LatentTrainer],
    configs: Path,
) -> None:
    """What the recipes do: train, evaluate with and without latent tokens, and write the run's files.

    Args:
        argv: the flags.
        method: name of the recipe's configurations.
        config_class: the configuration of the method.
        trainer_class: the trainer of the method.
        configs: the folder of the configurations.

    Raises:
        ValueError: flags, data or model are unusable.
    """
    script, args = parse(argv, method, config_class, configs)
    started = time.time()
    console, output, resume = start(args, script)

    # Data: rows of question, steps and answer
    check_tiny(script.model_name, script.dataset)
    to_train, held_out = load_data(script, console)
    base, tokenizer = load_tokenizer(script, args)
    datasets = tokenized(to_train, held_out, tokenizer, args)
    console.print(to_train.report())

    # Model and trainer: the trainer loads the model and attaches the latent tokens before LoRA wraps it
    accuracy = AccuracyCallback(script.eval_every, lambda model: evaluate_answers(model, tokenizer, held_out, **how))
    set_seed(args.seed)
    trainer = trainer_class(
        base,
        args,
        **datasets,
        processing_class=tokenizer,
        peft_config=script.lora(),
        callbacks=[accuracy],
    )
    compact_progress(trainer)
    model = trainer.model
    how = evaluation_options(script, args, model)
    explicit = evaluate_answers(model, tokenizer, held_out, latents="off", **how)

    # Train
    trainer.train(resume_from_checkpoint=resume)

    # Evaluate: with latent tokens, with replaced latent tokens, and with explicit steps
    after = {"latent tokens": evaluate_answers(model, tokenizer, held_out, **how)}
    after |= ablated(model, tokenizer, held_out, how)
    explicit_after = evaluate_answers(model, tokenizer, held_out, latents="off", **how)
    trainer.save_model(str(output / "final"))
    if not trainer.is_world_process_zero():
        return
    before = dict.fromkeys(after) | {"latent tokens": accuracy.before}
    rows = {name: (before[name], found) for name, found in after.items()}
    rows["explicit steps"] = (explicit, explicit_after)
    report(trainer, console, started, script, accuracy, rows, method=method, data=to_train.report())
