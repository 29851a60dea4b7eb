"""Run two batches through a teacher and a student and compare their aligned keys, values and queries. No training.

    make profile-alignment                                # the embedded default: the tiny teacher, an untrained student
    python recipes/profile_alignment.py --teacher Qwen/Qwen2.5-7B --student Qwen/Qwen2.5-1.5B --mode structured \\
        --batch_size 2 --seq_length 100               # on sums that are made in code
    python recipes/profile_alignment.py --teacher Qwen/Qwen2.5-7B-Instruct --student Qwen/Qwen2.5-1.5B-Instruct \\
        --mode both --dataset openai/gsm8k --dataset_config main --batch_size 4 --seq_length 256
    python recipes/profile_alignment.py --student runs/kv_distill_tiny/final --aligner runs/kv_distill_tiny/final/aligner

Each mode is measured twice on the second batch: with its initial projection, and with one fitted in closed form on the
first batch. Writes `profile.json` and `profile.png` (map of heads, attention side by side) to the output directory.
"""

import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from trl_ext.cli.user_errors import in_sentences


in_sentences()

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, set_seed
from trl.data_utils import apply_chat_template, is_conversational

from trl_ext.cli.console import PlainConsole
from trl_ext.cli.parser import RecipeParser
from trl_ext.common.config_checks import at_least, one_of
from trl_ext.common.run_folder import writable_folder
from trl_ext.common.teacher import check_vocabularies
from trl_ext.kv_distill.profile import capture_both, plot_profiles, profile_alignment
from trl_ext.kv_distill.segments import SegmentFinder
from trl_ext.tasks import equations, warm_start
from trl_ext.tasks.completions import completions
from trl_ext.tasks.data import DataArguments
from unsloth_ext import DelimiterMatcher, MapProjectionAligner
from unsloth_ext.common.hub import load_causal_lm, load_tokenizer
from unsloth_ext.kv_distill.aligner import DIRECTIONS, MODES


SHOWN = {
    "k": "keys, 1 - cos",
    "v": "values, 1 - cos",
    "attn": "attention KL",
    "norm": "log norms",
    "target_std_k": "target std",
    "target_rank_k": "target rank",
    "entropy_teacher": "entropy, teacher",
    "entropy_student": "entropy, student",
}


@dataclass
class ProfileArguments:
    """Flags: which models, data and alignment to profile."""

    flags_title = "Models, data and alignment"

    mode: str = field(
        default="both", metadata={"help": "'structured', 'flat' or 'both'.", "aliases": ["--kv_projection_mode"]}
    )
    teacher: str = field(default="tiny", metadata={"help": "'tiny', a hub id or a folder."})
    student: str = field(default="tiny", metadata={"help": "'tiny' (untrained), a hub id or a folder."})
    aligner: str | None = field(
        default=None, metadata={"help": "Folder of a trained projection, used instead of modes."}
    )
    batch_size: int = field(default=8, metadata={"help": "Number of rows in each of the two batches."})
    seq_length: int = field(
        default=128, metadata={"help": "Maximum length of a row in tokens; longer rows are truncated."}
    )
    answer_delimiter: str | None = field(
        default=None, metadata={"help": "Text before the answer; None: '####', or '#' for the tiny task."}
    )
    direction: str = field(
        default="student_to_teacher", metadata={"help": f"Which side is projected: {' or '.join(DIRECTIONS)}."}
    )
    layer_map: str = field(default="uniform", metadata={"help": "Teacher layers to compare with: 'uniform' or 'last'."})
    rope_space: str = field(
        default="rerotate",
        metadata={"help": "How rotary embeddings are treated when key heads are mixed: 'rerotate', 'pre' or 'post'."},
    )
    teacher_steps: int = field(
        default=equations.TEACHER.warm_start_steps,
        metadata={"help": "Number of SFT steps that train the tiny teacher."},
    )
    held_out: int = field(
        default=500, metadata={"help": "Number of held-out rows of the tiny task (--eval_size of training)."}
    )
    seed: int = field(default=0, metadata={"help": "Seed of the tiny task and of random weights."})
    cache_dir: str = field(default="runs/cache", metadata={"help": "Folder where the tiny teacher is cached."})
    output: str = field(default="runs/profile_alignment", metadata={"help": "Folder for profile.json and profile.png."})

    def __post_init__(self) -> None:
        at_least(self, batch_size=1, seq_length=2, teacher_steps=1, held_out=1)
        one_of(self, mode=(*MODES, "both"))


def load(args: ProfileArguments, data: DataArguments):
    """Teacher, student, tokenizer, and rows with `prompt` and `completion`."""
    teacher = args.teacher
    if teacher == "tiny":
        teacher = warm_start.tiny_with_steps(
            Path(args.cache_dir),
            seed=args.seed,
            held_out=args.held_out,
            steps=args.teacher_steps,
            progress=True,
            size=equations.TEACHER,
        )
    tokenizer = load_tokenizer(teacher if args.student == "tiny" else args.student)
    set_seed(args.seed)
    if args.student == "tiny":
        student = AutoModelForCausalLM.from_config(equations.config(tokenizer, equations.STUDENT))
    else:
        student = load_causal_lm(args.student, device_map="auto")
    teacher = load_causal_lm(teacher, device_map="auto")
    check_vocabularies(tokenizer, teacher, None)
    if args.teacher == "tiny" and data.dataset == "tiny":
        rows = equations.explicit(equations.split(args.held_out, args.seed)[1])
    else:
        wanted = 2 * args.batch_size
        if data.dataset == "tiny":
            found = sums(wanted, args.seq_length, args.seed)
        else:
            found = data.rows(split="train", size=wanted, seed=args.seed)
        rows = completions(found, tokenizer, args.answer_delimiter)
    return teacher.eval(), student.eval(), tokenizer, rows


def sums(count: int, seq_length: int, seed: int) -> list[dict[str, str]]:
    """Rows with `question`, `solution`, `answer` for any tokenizer: sums of 2 to about `seq_length / 16` numbers."""
    rng, found = random.Random(seed), []
    for _ in range(count):
        total, *rest = (rng.randint(1, 99) for _ in range(rng.randint(2, max(2, seq_length // 16))))
        question, steps = "+".join(map(str, (total, *rest))), []
        for term in rest:
            steps.append(f"{total}+{term}={total + term}")
            total += term
        found.append({"question": f"What is {question}?", "solution": "; ".join(steps), "answer": str(total)})
    return found


def batches(args: ProfileArguments, tokenizer, rows) -> list[dict[str, torch.Tensor]]:
    """Two tokenized batches with segments."""
    if len(rows) < 2 * args.batch_size:
        raise ValueError(
            f"{len(rows)} rows; --batch_size {args.batch_size} needs {2 * args.batch_size} for its two batches"
        )
    find = SegmentFinder(DelimiterMatcher(tokenizer, args.answer_delimiter))
    made = []
    for start in (0, args.batch_size):
        ids, labels = [], []
        for row in rows.select(range(start, start + args.batch_size)):
            if is_conversational(row):
                row = apply_chat_template({k: row[k] for k in ("prompt", "completion")}, tokenizer)
            prompt, completion = (
                tokenizer(row[name], add_special_tokens=False)["input_ids"] for name in ("prompt", "completion")
            )
            ids.append([*prompt, *completion][: args.seq_length])
            labels.append([*[-100] * len(prompt), *completion][: args.seq_length])
        segments = find({"input_ids": ids, "labels": labels})["segment_ids"]
        padded = tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
        width = padded["input_ids"].shape[1]
        segments = torch.tensor([[*row, *[-1] * (width - len(row))] for row in segments])
        made.append(
            {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"], "segment_ids": segments}
        )
    return made


def main() -> None:
    args, data = RecipeParser((ProfileArguments, DataArguments)).parse_args_and_config()
    generated = data.dataset == "tiny" and args.teacher != "tiny"
    args.answer_delimiter = args.answer_delimiter or ("#" if data.dataset == "tiny" and not generated else "####")
    console, output = PlainConsole(), writable_folder(args.output, "--output")
    teacher, student, tokenizer, rows = load(args, data)
    first, second = batches(args, tokenizer, rows)

    def make(mode: str, init: str | None) -> MapProjectionAligner:
        set_seed(args.seed)
        return MapProjectionAligner(
            teacher.config, student.config, mode, args.direction, args.layer_map, init=init, rope_space=args.rope_space
        )

    aligners = {}
    if args.aligner:
        aligners["trained"] = MapProjectionAligner.from_pretrained(args.aligner)
    else:
        for mode in MODES if args.mode == "both" else (args.mode,):
            aligners[mode], aligners[f"{mode}, fitted"] = make(mode, None), make(mode, "procrustes")
    profiles = {}
    for name, aligner in aligners.items():
        if not aligner.fitted:
            aligner.fit(*capture_both(teacher, student, aligner, first))
        profiles[name] = profile_alignment(aligner, *capture_both(teacher, student, aligner, second))

    shapes = Table(title="Shapes (B, L, H, T, D)", title_justify="left")
    for heading in ("", "teacher's layers", "student", "as compared"):
        shapes.add_column(heading)
    for name, each in next(iter(profiles.values())).shapes.items():
        shapes.add_row(name.upper(), *map(str, each))
    console.print(shapes)
    table = Table(
        title=f"{args.batch_size} rows of {'sums' if generated else data.dataset}",
        title_justify="left",
    )
    for heading in ("", *profiles):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=not heading)
    for key, name in SHOWN.items():
        table.add_row(name, *(f"{found.metrics[key]:.3f}" for found in profiles.values()))
    table.add_row("not finite", *(str(found.not_finite) for found in profiles.values()))
    console.print(table)
    plot_profiles(output / "profile.png", profiles, f"{args.teacher} to {args.student}")
    (output / "profile.json").write_text(json.dumps({n: p.numbers() for n, p in profiles.items()}, indent=2) + "\n")
    console.print(f"Written: {output / 'profile.json'}, {output / 'profile.png'}")


if __name__ == "__main__":
    main()
