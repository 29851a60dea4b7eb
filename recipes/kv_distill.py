"""KV distillation: SFT of a student that also follows a larger teacher's keys, values and attention.

    make train-kv-distill                                    # the embedded default; with a GPU, Qwen2.5-7B to 1.5B on GSM8K
    python recipes/kv_distill.py --kv_projection_mode flat --output_dir runs/kv_flat
    python recipes/kv_distill.py --model_name Qwen/Qwen2.5-1.5B-Instruct --teacher_model_name_or_path \\
        Qwen/Qwen2.5-7B-Instruct --dataset openai/gsm8k --dataset_config main
    python recipes/kv_distill.py --resume_from_checkpoint latest

Every field of TRL's SFTConfig and of KVDistillConfig is a flag; `--config FILE.yaml` sets many. Writes the student and
the projection (`final/`, `final/aligner/`), `summary.json` and `curves.png` into the output directory.
"""

import os
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path


os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from trl_ext.cli.user_errors import in_sentences


in_sentences()

from transformers import set_seed

from trl_ext import KVDistillConfig, KVDistillTrainer
from trl_ext.cli.flags import chosen
from trl_ext.cli.parser import RecipeParser
from trl_ext.cli.recipe import RecipeArguments, check_tiny, finish, leave, start
from trl_ext.cli.report import before_after_table, compact_progress
from trl_ext.common.config_checks import at_least
from trl_ext.kv_distill.method import METHOD
from trl_ext.tasks import equations, warm_start
from trl_ext.tasks.completions import completions
from trl_ext.tasks.data import DataArguments
from trl_ext.tasks.evaluation import AccuracyCallback, evaluate
from unsloth_ext.common.hub import load_tokenizer, new_causal_lm


CONFIGS = Path(__file__).parent / "configs"
EMBEDDED = ("tiny",)


@dataclass
class ScriptArguments(RecipeArguments):
    """The recipe's own flags, besides the trainer's configuration; `model_name` is the student."""

    max_new_tokens: int = field(
        default=256, metadata={"help": "Maximum number of tokens of a completion in evaluation."}
    )
    teacher_steps: int = field(
        default=equations.TEACHER.warm_start_steps,
        metadata={"help": "Number of SFT steps that train the tiny teacher."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, max_new_tokens=1, teacher_steps=1)


def load_tiny(script: ScriptArguments, args: KVDistillConfig):
    """Student, folder of the teacher, tokenizer, training and held-out rows of the built-in task."""
    teacher = warm_start.tiny_with_steps(
        Path(script.cache_dir),
        seed=script.warm_start_seed,
        held_out=script.eval_size,
        steps=script.teacher_steps,
        progress=not args.disable_tqdm,
        size=equations.TEACHER,
    )
    tokenizer = load_tokenizer(teacher)
    set_seed(args.seed)
    student = new_causal_lm(equations.config(tokenizer, equations.STUDENT))
    train, held_out = (equations.explicit(rows) for rows in equations.split(script.eval_size, script.warm_start_seed))
    return student, teacher, tokenizer, train, held_out


def load_data(script: ScriptArguments, data: DataArguments, args: KVDistillConfig, tokenizer):
    """The training rows and the held-out rows."""
    examples, train, held_out = data.split(
        train_size=script.train_size, eval_dataset=script.eval_dataset, eval_size=script.eval_size, seed=args.seed
    )
    return (completions(rows, tokenizer, args.answer_delimiter, examples) for rows in (train, held_out))


def main() -> None:
    parser = RecipeParser((ScriptArguments, DataArguments, KVDistillConfig), EMBEDDED)
    _, config, others = chosen(sys.argv[1:], CONFIGS, "kv_distill", EMBEDDED)
    script, data, args = parser.parse_args_and_config(["--config", str(config), *others])
    check_tiny(script.model_name, data.dataset)
    started = time.time()
    console, output, resume = start(args, script)
    if script.model_name == "tiny":
        model, teacher, tokenizer, train, held_out = load_tiny(script, args)
    else:
        model, teacher = script.model_name, args.teacher_model_name_or_path
        tokenizer = load_tokenizer(model, trust_remote_code=args.trust_remote_code)
        train, held_out = load_data(script, data, args, tokenizer)

    how = {
        "delimiter": args.answer_delimiter,
        "max_new_tokens": script.max_new_tokens,
        "batch_size": script.eval_batch,
        "thinking": "off",
        "progress": not args.disable_tqdm and args.process_index == 0,
    }
    accuracy = AccuracyCallback(script.eval_every, lambda model: evaluate(model, tokenizer, held_out, **how))
    trainer = KVDistillTrainer(
        model,
        args,
        train_dataset=train,
        eval_dataset=held_out if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=script.lora(),
        callbacks=[accuracy],
        teacher_model=teacher,
    )
    compact_progress(trainer)
    trainer.train(resume_from_checkpoint=resume)
    after = evaluate(trainer.model, tokenizer, held_out, **how)
    trainer.save_model(str(output / "final"))
    if not trainer.is_world_process_zero():
        return
    before_after_table(accuracy.before, after, console)
    finish(
        trainer,
        console,
        started,
        ("KV distillation", script.model_name, data.dataset),
        accuracy,
        after,
        METHOD.curves,
        last={k: v for e in trainer.state.log_history for k, v in e.items() if k.startswith(("kv/", "loss"))},
        script=asdict(script),
        data=asdict(data),
    )


if __name__ == "__main__":
    main()
    leave()
