"""Accuracy of a checkpoint with hybrid or plain decoding, and the contribution of the thinking states.

    python recipes/eval_gsm8k.py --checkpoint runs/hrpo_tiny/final                       # the embedded task
    python recipes/eval_gsm8k.py --checkpoint runs/hrpo_gsm8k/final --dataset openai/gsm8k --dataset_config main
    python recipes/eval_gsm8k.py --checkpoint runs/hrpo_tiny/final --thinking zero shuffle noise off

The table has a row for each value of --thinking: accuracy with its 95% interval, format rate, mean length, thinking
share. `on` is the model as it was trained. `zero`, `shuffle` (another row's states), `noise` (same norm) and
`interpolate` (halfway to another row's) replace its states. `off` is plain decoding with the same weights.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from trl_ext.cli.console import PlainConsole
from unsloth_ext.common.backend import unsloth_can_run


if unsloth_can_run()[0]:
    import unsloth  # noqa: F401 - must be imported before transformers to patch its models

from rich.table import Table

from trl_ext.cli.parser import RecipeParser
from trl_ext.common.config_checks import at_least
from trl_ext.common.run_folder import writable_file
from trl_ext.tasks import arithmetic
from trl_ext.tasks.data import HELD_OUT_SEED, DataArguments, chat_dataset, without
from trl_ext.tasks.evaluation import check_room, evaluate
from unsloth_ext import FastThinkingModel, ThinkingConfig
from unsloth_ext.common.ablations import ABLATIONS
from unsloth_ext.common.hub import saved_settings


@dataclass
class EvalArguments:
    """Flags: what to evaluate, and how."""

    flags_title = "Model, data and evaluation"

    checkpoint: str = field(metadata={"help": "Folder of an adapter or a full model, or a hub id."})
    split: str = field(default="test", metadata={"help": "Split of a hub dataset."})
    limit: int | None = field(default=None, metadata={"help": "Use only this many of the first problems."})
    thinking: list[str] = field(
        default_factory=lambda: ["on"], metadata={"help": f"Any of: on, {', '.join(ABLATIONS)}, off."}
    )
    answer_delimiter: str = field(default="####", metadata={"help": "Text that ends the thinking."})
    max_new_tokens: int | None = field(
        default=None,
        metadata={"help": "Maximum number of tokens of a completion; default: 512, or 36 for the tiny task."},
    )
    max_seq_length: int | None = field(
        default=None,
        metadata={"help": "Maximum length of prompt and completion in tokens; default: the model's, at most 2048."},
    )
    batch_size: int = field(default=64, metadata={"help": "Batch size of decoding."})
    do_sample: bool = field(default=False, metadata={"help": "Sample instead of taking the most likely token."})
    temperature: float = field(
        default=1.0, metadata={"help": "Temperature of sampling and of soft embeddings, as in training."}
    )
    load_in_4bit: bool = field(default=False, metadata={"help": "Load the base model in 4 bits."})
    seed: int = field(
        default=0,
        metadata={"help": "Seed of the training, for generated problems."},
    )
    held_out: int = field(default=400, metadata={"help": "Number of held-out problems of the tiny task."})
    output: str | None = field(
        default=None,
        metadata={"help": "JSON file; default: eval.json, in CHECKPOINT if it is the folder of a thinking model."},
    )

    def __post_init__(self) -> None:
        at_least(self, limit=1, max_new_tokens=1, max_seq_length=2, batch_size=1, held_out=1)
        if not self.answer_delimiter:
            raise ValueError("answer_delimiter='': give the text that ends the thinking, such as '####'")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: must be more than 0; without --do_sample, decoding is greedy"
            )
        unknown = set(self.thinking) - {"on", "off", *ABLATIONS}
        if unknown or not self.thinking:
            raise ValueError(f"thinking={' '.join(sorted(unknown))}: choose from on, {', '.join(ABLATIONS)}, off")


def rows_of(args: EvalArguments, data: DataArguments):
    """Rows with `prompt` and `answer`."""
    if data.dataset == "tiny":
        found = arithmetic.as_dataset(arithmetic.split_problems(args.held_out, args.seed)[1])
        return found.select(range(min(args.limit or len(found), len(found))))
    examples = data.rows(split="train", size=None, seed=args.seed)[: data.num_fewshot] if data.num_fewshot else []
    rows = data.rows(split=args.split, size=None, seed=args.seed + HELD_OUT_SEED)
    return chat_dataset(without(rows, examples)[: args.limit], args.answer_delimiter, examples)


def main() -> None:
    args, data = RecipeParser((EvalArguments, DataArguments)).parse_args_and_config()
    output = writable_file(args.output, "--output") if args.output else None
    thinks = saved_settings(args.checkpoint, "hrpo") is not None
    if not thinks and set(args.thinking) != {"off"}:
        raise ValueError(
            f"--checkpoint {args.checkpoint} has no trained thinking modules, and new ones would be random; --thinking off "
            "measures the model as it is"
        )
    ours = thinks and Path(args.checkpoint).is_dir()
    output = output or writable_file((Path(args.checkpoint) if ours else Path()) / "eval.json", "--output")
    rows = rows_of(args, data)
    model, tokenizer = FastThinkingModel.from_pretrained(
        args.checkpoint,
        max_seq_length=args.max_seq_length,
        load_in_4bit=args.load_in_4bit,
        thinking=None if thinks else ThinkingConfig(),  # unused: thinking is off
    )
    new = args.max_new_tokens or (36 if data.dataset == "tiny" else 512)
    if args.max_seq_length:
        check_room(tokenizer, rows["prompt"], new, args.max_seq_length, "max_new_tokens")
    results = {}
    for thinking in args.thinking:
        results[thinking] = evaluate(
            model,
            tokenizer,
            rows,
            delimiter=args.answer_delimiter,
            max_new_tokens=new,
            batch_size=args.batch_size,
            temperature=args.temperature,
            do_sample=args.do_sample,
            thinking=thinking,
            progress=True,
        )
    table = Table(title=f"{args.checkpoint}: {len(rows)} problems of {data.dataset}", title_justify="left")
    for heading in ("thinking", "accuracy (95% interval)", "format rate", "mean length", "thinking share"):
        table.add_column(heading, justify="left" if heading == "thinking" else "right")
    for thinking, r in results.items():
        accuracy = f"{r.accuracy:.1%} ({r.low:.1%} to {r.high:.1%})"
        table.add_row(thinking, accuracy, f"{r.format_rate:.1%}", f"{r.mean_length:.1f}", f"{r.thinking_share:.1%}")
    PlainConsole().print(table)
    output.write_text(json.dumps({name: result.numbers() for name, result in results.items()}, indent=2) + "\n")
    PlainConsole().print(f"Written: {output}")


if __name__ == "__main__":
    main()
