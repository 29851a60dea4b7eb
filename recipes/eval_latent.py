"""Analyse latent tokens: accuracy with and without them, what they contain, how close they are to the steps.

    python recipes/eval_latent.py --checkpoint runs/kava_tiny/final                          # the embedded task
    python recipes/eval_latent.py --checkpoint runs/kava_gsm8k/final --dataset openai/gsm8k --dataset_config main
    python recipes/eval_latent.py --checkpoint runs/codi_tiny/final --num_latents 1 2 4 6 --show 8

Answers are generated, never teacher-forced. Rows of the first table: `on` is the trained model. `zero`, `shuffle`
(another question's), `noise` (same norm) and `interpolate` (halfway to another question's) replace the latent inputs.
`off` is plain generation with the same weights: the teacher, which writes its steps. Then follow the accuracy with fewer
latent tokens, the tokens that the LM head decodes from them, and a picture of their keys and values against the
teacher's (`latent.png`). All results are in `eval.json` too.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from rich.table import Table

from trl_ext.cli.console import PlainConsole
from trl_ext.cli.parser import RecipeParser
from trl_ext.common.config_checks import at_least
from trl_ext.common.run_folder import writable_folder
from trl_ext.latent.config import LatentArguments
from trl_ext.latent.data import LatentCollator, LatentTokenizer
from trl_ext.latent.evaluation import LATENTS, LatentEvaluation, evaluate_answers
from trl_ext.latent.sources import load_rows
from trl_ext.latent.visualization import plot_similarity, probe
from trl_ext.tasks import equations
from unsloth_ext import LatentEngine, LatentModel, kv_similarity
from unsloth_ext.common.hub import saved_settings
from unsloth_ext.common.vllm_installed import require_vllm
from unsloth_ext.common.wrapping import backbone_of
from unsloth_ext.latent.config import thinking_with


@dataclass
class EvalArguments:
    """Flags: what to evaluate, and how."""

    flags_title = "Model, data and evaluation"

    checkpoint: str = field(metadata={"help": "Folder of an adapter or a full model, or a hub id."})
    dataset: str = field(
        default="tiny", metadata={"help": "A hub id or a file, as for training; 'tiny' is the built-in task."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a hub dataset ('main')."})
    split: str = field(default="test", metadata={"help": "Split of a hub dataset."})
    limit: int | None = field(default=None, metadata={"help": "Use only this many of the first questions."})
    latents: list[str] = field(
        default_factory=lambda: list(LATENTS), metadata={"help": f"Any of: {', '.join(LATENTS)}."}
    )
    num_latents: list[int] = field(
        default_factory=list, metadata={"help": "Numbers of latent tokens to try; default: four numbers up to all."}
    )
    answer_prompt: str | None = field(
        default=None, metadata={"help": "Text before each answer; default: the default of training."}
    )
    step_separator: str | None = field(
        default=None, metadata={"help": "Text after each step; default: the default of training."}
    )
    max_new_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Maximum number of tokens of an answer with explicit steps; default: 256, or 32 for the tiny task."
        },
    )
    batch_size: int = field(default=64, metadata={"help": "Batch size of evaluation."})
    engine: Literal["transformers", "vllm"] = field(
        default="transformers", metadata={"help": "What decodes the answers of evaluation (docs/vllm.md)."}
    )
    show: int = field(default=4, metadata={"help": "Number of questions whose latent tokens are shown."})
    seed: int = field(default=0, metadata={"help": "Seed of the tiny task (--warm_start_seed of the training)."})
    held_out: int = field(default=500, metadata={"help": "Number of held-out questions of the tiny task."})
    output: str | None = field(
        default=None, metadata={"help": "Folder for eval.json and latent.png; default: CHECKPOINT."}
    )

    def __post_init__(self) -> None:
        at_least(self, limit=1, max_new_tokens=1, batch_size=1, show=0)
        if self.engine == "vllm":
            require_vllm("engine='vllm'")
        tiny = self.dataset == "tiny"
        for name, of_tiny, other in (
            ("answer_prompt", equations.ANSWER_PROMPT, LatentArguments.answer_prompt),
            ("step_separator", equations.STEP_SEPARATOR, LatentArguments.step_separator),
            ("max_new_tokens", equations.MAX_NEW_TOKENS, 256),
        ):
            if getattr(self, name) is None:
                setattr(self, name, of_tiny if tiny else other)
        unknown = set(self.latents) - set(LATENTS)
        if unknown or not self.latents:
            raise ValueError(f"latents={' '.join(sorted(unknown))}: choose from {', '.join(LATENTS)}")


def rows_of(args: EvalArguments) -> list[dict]:
    """Rows with `question`, `steps`, `answer`."""
    if args.dataset == "tiny":
        return equations.split(args.held_out, args.seed)[1][: args.limit]
    found = load_rows(args.dataset, split=args.split, config=args.dataset_config, size=args.limit, need_steps=False)
    print(found.report())
    return found.usable


def accuracy_table(results: dict[str, LatentEvaluation], title: str, first: str) -> Table:
    table = Table(title=title, title_justify="left")
    for heading in (first, "accuracy", "95% interval", "passes", "ms"):
        table.add_column(heading, justify="left" if heading == first else "right", no_wrap=True)
    for name, r in results.items():
        interval = f"{r.low:.1%} to {r.high:.1%}"
        table.add_row(name, f"{r.accuracy:.1%}", interval, f"{r.forward_passes:.1f}", f"{r.seconds * 1000:.2f}")
    return table


def main() -> None:
    (args,) = RecipeParser(EvalArguments).parse_args_and_config()
    folder = writable_folder(args.output, "--output") if args.output else None
    thinks = saved_settings(args.checkpoint, "latent") is not None  # if not, LatentModel will report what is wrong
    ours = args.checkpoint if thinks and Path(args.checkpoint).is_dir() else "."
    folder = folder or writable_folder(ours, "--output")
    rows = rows_of(args)
    thinker = LatentModel.from_pretrained(args.checkpoint)
    model, tokenizer = thinker.model, thinker.tokenizer
    trained = backbone_of(model).latent_config.num_latents
    fewer = args.num_latents or sorted({max(1, trained * i // 4) for i in range(1, 5)})
    if not all(1 <= m <= trained for m in fewer):
        raise ValueError(
            f"--num_latents {' '.join(map(str, fewer))}: the model was trained with {trained}; choose 1 to {trained}"
        )
    how = {
        "answer_prompt": args.answer_prompt,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch_size,
        "engine": LatentEngine(model) if args.engine == "vllm" else None,
        "progress": True,
    }
    console = PlainConsole()
    results = {name: evaluate_answers(model, tokenizer, rows, latents=name, **how) for name in args.latents}
    console.print(
        accuracy_table(results, f"{args.checkpoint}: {len(rows)} questions of {args.dataset}", "latent tokens")
    )
    by_number = {}
    for count in fewer:
        with thinking_with(model, num_latents=count):
            by_number[str(count)] = evaluate_answers(model, tokenizer, rows, **how)
    console.print(accuracy_table(by_number, f"With fewer than the {trained} of training", "number"))
    console.print("Forward passes and milliseconds are per question, answered in batches.")

    looked = probe(model, tokenizer, rows, k=1, batch_size=args.batch_size)
    table = Table(
        title="Most likely token that the LM head decodes from each latent token", title_justify="left", show_lines=True
    )
    for heading in ("question", "steps", "latent tokens"):
        table.add_column(heading)
    for row, slots in zip(rows[: args.show], looked.tokens, strict=False):
        table.add_row(row["question"], "; ".join(row["steps"]), " ".join(slot[0].strip() or "␣" for slot in slots))
    console.print(table)
    if looked.found is not None:
        console.print(
            f"Results of steps that some latent token decodes to: {looked.found:.1%} "
            f"(for another question's results: {looked.by_chance:.1%})"
        )

    with_steps = [row for row in rows if len(row["steps"]) > 1][
        : args.batch_size
    ]  # the last step is not part of a trace
    if with_steps:
        tokens = LatentTokenizer(tokenizer, args.answer_prompt, args.step_separator, True, None)
        collate = LatentCollator(tokenizer.pad_token_id, backbone_of(model).latent_token_ids[2])
        batch = collate([tokens(row, i, args.dataset) for i, row in enumerate(with_steps)])
        names = ("question_ids", "question_mask", "teacher_ids", "trace_mask", "answer_mask")
        similarity = kv_similarity(model, *(batch[name].to(model.device) for name in names))
        plot_similarity(folder / "latent.png", similarity, f"{args.checkpoint}: latent against explicit")
    summary = {
        "n": len(rows),
        "latents": {name: r.numbers() for name, r in results.items()},
        "num_latents": {name: r.numbers() for name, r in by_number.items()},
        "probe": {"found": looked.found, "by_chance": looked.by_chance},
    }
    (folder / "eval.json").write_text(json.dumps(summary, indent=2) + "\n")
    console.print(f"Written: {folder / 'eval.json'}" + (f", {folder / 'latent.png'}" if with_steps else ""))


if __name__ == "__main__":
    main()
